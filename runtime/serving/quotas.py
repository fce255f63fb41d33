"""What the requests in a scheduler take, in all and for each client, and how much of it they may."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from runtime.serving.requests import AnswerRequest, AnyRequest, Limits

Resource = Literal["draw", "ask", "bytes"]
"""Images that are drawn, questions that are answered, and bytes of the images of questions."""


@dataclass(frozen=True)
class Quota:
    """How much there may be of a resource."""

    noun: str
    most: int
    most_per_client: int


def needs_of(request: AnyRequest, jobs: int) -> dict[Resource, int]:
    """Returns what so many jobs of a request take."""
    if isinstance(request, AnswerRequest):
        return {"ask": jobs, "bytes": jobs * request.image_bytes}
    return {"draw": jobs}


class Quotas:
    """Counts what is taken. Requests without a client id count as one client's."""

    def __init__(self, limits: Limits) -> None:
        self._quotas: dict[Resource, Quota] = {
            "draw": Quota("images", limits.max_queued_images, limits.max_images_per_client),
            "ask": Quota("questions", limits.max_queued_questions, limits.max_questions_per_client),
            "bytes": Quota("bytes of images", limits.max_queued_bytes, limits.max_queued_bytes // 2),
        }
        self._taken: Counter[Resource] = Counter()
        self._of_client: Counter[tuple[Resource, str]] = Counter()

    def taken(self, resource: Resource) -> int:
        """Returns how much is taken in all."""
        return self._taken[resource]

    def of_client(self, resource: Resource, client_id: str) -> int:
        """Returns how much one client has taken."""
        return self._of_client[resource, client_id]

    def refusal(self, needs: Mapping[Resource, int], client_id: str) -> str | None:
        """Returns why there is no room now for what a client needs, or None."""
        who = f"client {client_id!r} has" if client_id else "clients without an id have"
        for resource, amount in needs.items():
            quota, taken, own = self._quotas[resource], self._taken[resource], self._of_client[resource, client_id]
            if taken + amount > quota.most:
                return f"the queue has {taken} of {quota.most} {quota.noun} and no room for {amount} more"
            if own + amount > quota.most_per_client:
                return f"{who} {own} of {quota.most_per_client} {quota.noun} in the queue and no room for {amount} more"
        return None

    def take(self, needs: Mapping[Resource, int], client_id: str) -> None:
        """Counts what a client takes; negative amounts are given back."""
        for resource, amount in needs.items():
            self._taken[resource] += amount
            self._of_client[resource, client_id] += amount
            if not self._of_client[resource, client_id]:
                del self._of_client[resource, client_id]
