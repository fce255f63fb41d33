"""One engine of a bundle as a Triton model, for servers without a backend that can run it (`--platform python`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from model_repository.schema import ENGINE_FILE
from runtime.backends import open_backend
from runtime.errors import one_line
from runtime.manifest import EngineEntry, check_file


class TritonPythonModel:
    """Runs the engine as the runtime does, with the same checks."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"]) / args["model_version"]
        entry = EngineEntry.model_validate_json((folder / ENGINE_FILE).read_text(encoding="utf-8"))
        options = json.loads(parameters["provider_options"]["string_value"]) if "provider_options" in parameters else {}
        if args["model_instance_kind"] == "GPU":
            options["device_id"] = args["model_instance_device_id"]
        self.backend = open_backend(parameters["provider"]["string_value"], options)
        for file in self.backend.files(entry):
            check_file(folder, file)
        self.session = self.backend.load(folder, entry)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            outputs = self.session.run({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(one_line(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value.numpy()) for name, value in outputs.items()])

    def finalize(self) -> None:
        self.session.close()
        self.backend.close()
