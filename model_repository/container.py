"""Starts the Triton server of a container, with its control protocols behind a key (deploy/Dockerfile).

    python3 -m model_repository.container [OPTION OF TRITONSERVER]...

The key is in the file that the environment variable LATTE_FLOW_CONTROL_KEY names, the repository in the folder that
LATTE_FLOW_MODELS names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from model_repository.control import read_key, server_options
from runtime.errors import LatteFlowError

KEY_VARIABLE, KEY_FILE = "LATTE_FLOW_CONTROL_KEY", "/run/secrets/control-key"
MODELS_VARIABLE, MODELS_FOLDER = "LATTE_FLOW_MODELS", "/models"


def server_command(environment: Mapping[str, str], options: Sequence[str] = ()) -> list[str]:
    """Returns the command line of the server.

    Raises:
        InputError: the key file holds no key.
    """
    key = read_key(Path(environment.get(KEY_VARIABLE, KEY_FILE)))
    return ["tritonserver", *server_options(environment.get(MODELS_VARIABLE, MODELS_FOLDER), key), *options]


def main() -> None:
    """Replaces this process by the server's, which then gets the container's signals."""
    try:
        command = server_command(os.environ, sys.argv[1:])
        os.execvp(command[0], command)
    except LatteFlowError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot start tritonserver: {error.strerror}; run this in NVIDIA's Triton container")


if __name__ == "__main__":
    main()
