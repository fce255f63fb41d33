"""The latent cache: what the frozen autoencoder and the tokenizer make of a data set, computed once.

    <folder>/<autoencoder>/shards/<name>.safetensors        latents by the hash of image and crop (`latte.data.shards`)
    <folder>/<autoencoder>/listings/<data set>/<part>/      the rows of a data set (`latte.data.listing`)

Latents belong to an image, a crop and an autoencoder, not to a data set: data sets that share images share latents, and
one that grows encodes what is new. A listing belongs to a data set, an image policy and a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch.utils.data import DataLoader, Dataset

from latte.data.cached_rows import CachedRows
from latte.data.encoding import Encoder, Preparation, Prepared, PreparedRows, PreparedStream, encode_all
from latte.data.images import BadRowError, ImagePolicy
from latte.data.listing import ListingPart, complete_parts, read_listing
from latte.data.shards import (
    KEY_BYTES,
    DamagedShardError,
    KeyIndex,
    Shard,
    find_keys,
    index_of,
    open_shard,
    statistics_of,
)
from latte.data.source import ImageTextDataSet
from latte.model import LatteFlow
from runtime.console import progress_bar, stderr
from runtime.errors import InputError, TrainingError
from runtime.files import make_writable_folder

ROWS_PER_SHARD = 8192
"""64 MiB of latents of the paper's size, 8x8x32."""
SPARE_BYTES = 64 * 2**20
"""Free space that is left when a cache is filled."""


class LatentCache:
    """A folder of latents for one autoencoder and tokenizer.

    Args:
        folder: of the cache; created if it is missing.
        model: whose autoencoder encodes, on its device and in its dtype, and whose tokenizer splits captions.
        rows_per_shard: number of latents in a file.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, model: LatteFlow, *, rows_per_shard: int = ROWS_PER_SHARD) -> None:
        self.model = model
        self.autoencoder = hash_of_autoencoder(model.vae)
        self.rows_per_shard = rows_per_shard
        self.folder = folder / self.autoencoder[:16]
        for name in ("shards", "listings"):
            make_writable_folder(self.folder / name)

    def fill(
        self,
        data_set: ImageTextDataSet,
        policy: ImagePolicy,
        *,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        """Encodes all images of a data set that are not cached, and splits all captions into tokens.

        A call that is killed keeps the shards it wrote. With several processes, each fills its part; all must be done
        before `rows` is called. A data set that is cached costs one reading of the shards, to verify their hashes.

        Args:
            rank: number of this process, from 0.
            world: number of processes that fill the cache together.
            batch_size: images encoded at once.
            num_workers: processes that read and decode.

        Raises:
            InputError: a caption is longer than the model's limit, the crop cannot be cached, or there is no space.
            TrainingError: most rows are bad, or a shard cannot be written.
        """
        if policy.crop == "random":
            raise InputError("--crop random cannot be cached, since every epoch crops elsewhere; use center or buckets")
        if not 0 <= rank < world:
            raise InputError(f"rank must be in [0, {world}), got {rank}")
        shards = self._verified_shards()
        index = index_of(shards)
        folder = self._listing_folder(data_set, policy)
        if not data_set.streamed and self._is_listed(folder, policy, index):
            return
        part = ListingPart(self.model.tokenize)
        preparation = Preparation(data_set, policy, index)
        if data_set.streamed:
            source: Dataset[Prepared] = PreparedStream(preparation, rank, world)
            total = None
        else:
            rows = range(len(data_set) * rank // world, len(data_set) * (rank + 1) // world)
            self._check_space(len(data_set) * (1 + policy.flip) - len(index), policy)
            _check_captions(data_set, rows, part)
            source, total = PreparedRows(preparation, rows), len(rows)
        encoder = Encoder(
            self.model.vae,
            self.folder / "shards",
            self.autoencoder,
            batch_size=batch_size,
            rows_per_shard=self.rows_per_shard,
        )
        loader = DataLoader(source, batch_size=None, num_workers=num_workers)
        with progress_bar() if rank == 0 else nullcontext() as bar:
            encode_all(
                bar.track(loader, total, description="cache latents") if bar else loader, encoder, part, data_set.name
            )
        shards += [open_shard(path, self.autoencoder, verify=False) for path in encoder.written]
        places = find_keys(part.keys(), index_of(shards))
        if places is None:
            raise TrainingError(f"shards disappeared from {self.folder}; fill the cache again")
        channels = self.model.config.latent_channels
        part.write(folder, rank, world, statistics_of(places, shards, channels))

    def rows(self, data_set: ImageTextDataSet, policy: ImagePolicy) -> CachedRows:
        """Returns the rows of a data set that `fill` has cached.

        Raises:
            TrainingError: it is not cached, or not completely.
        """
        folder = self._listing_folder(data_set, policy)
        parts = complete_parts(folder)
        if not parts:
            raise TrainingError(f"{data_set.name} is not in the latent cache {self.folder}; fill it first")
        listing = read_listing(parts, 1 + policy.flip, by_name=data_set.streamed)
        try:
            shards = [open_shard(path, self.autoencoder, verify=False) for path in self._shard_paths()]
        except DamagedShardError as error:
            raise TrainingError(f"a shard of {self.folder} is damaged: {error}; fill the cache again") from error
        places = find_keys(listing.keys, index_of(shards))
        if places is None:
            raise TrainingError(f"latents of {data_set.name} are missing in {self.folder}; fill the cache again")
        paths = [shard.path for shard in shards]
        has_buckets = policy.crop == "buckets"
        return CachedRows(
            data_set.name, listing, paths, places, self.autoencoder, policy.sizes, has_buckets=has_buckets
        )

    def _listing_folder(self, data_set: ImageTextDataSet, policy: ImagePolicy) -> Path:
        tokenizer = self.model.tokenizer
        parts = (
            data_set.fingerprint(),
            repr(policy),
            tokenizer.backend_tokenizer.to_str(),
            str(tokenizer.chat_template),
            str(self.model.config.max_prompt_tokens),
        )
        return self.folder / "listings" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def _is_listed(self, folder: Path, policy: ImagePolicy, index: KeyIndex) -> bool:
        try:
            parts = complete_parts(folder)
            return bool(parts) and find_keys(read_listing(parts, 1 + policy.flip).keys, index) is not None
        except TrainingError as error:
            _warn(str(error))
            return False

    def _shard_paths(self) -> list[Path]:
        return sorted((self.folder / "shards").glob("*.safetensors"))

    def _verified_shards(self) -> list[Shard]:
        """Opens all shards; one that is damaged is named and removed, so that its latents are made again."""
        shards = []
        for path in self._shard_paths():
            try:
                shards.append(open_shard(path, self.autoencoder, verify=True))
            except DamagedShardError as error:
                _warn(f"the shard {path} is damaged ({error}); its latents are made again")
                path.unlink(missing_ok=True)  # another process may have removed it
        return shards

    def _check_space(self, missing: int, policy: ImagePolicy) -> None:
        """Checks the free space for a number of latents, before any is encoded."""
        values = max(height * width for height, width in policy.sizes) // policy.factor**2
        needed = max(missing, 0) * (4 * values * self.model.config.latent_channels + KEY_BYTES) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if missing > 0 and needed > free:
            raise InputError(
                f"the latents of {missing} images need {needed / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB "
                "free; make room or name another folder"
            )


def _check_captions(data_set: ImageTextDataSet, rows: Iterable[int], part: ListingPart) -> None:
    """Splits the captions of all rows into tokens, before any image is encoded."""
    too_long: list[InputError] = []
    for row in rows:
        try:
            captions = data_set.captions_of(row)
        except BadRowError:
            continue  # the row is named when its image is read
        for caption in captions:
            try:
                part.caption(caption, lambda row=row: data_set.name_of(row))  # type: ignore[misc]
            except InputError as error:
                too_long.append(error)
    if too_long:
        raise InputError(f"{data_set.name}: {len(too_long)} captions are too long, the first in {too_long[0]}")


def hash_of_autoencoder(vae: AutoencoderDC) -> str:
    """Returns a hash of what decides about latents: the config, and the encoder's weights as they are in memory."""
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(vae.encoder.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _warn(message: str) -> None:
    stderr.print(message, style="yellow", markup=False, soft_wrap=True)
