"""The log of a service: a line for each request that ends, and for what goes wrong; as text or as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from dataclasses import asdict
from typing import Literal, get_args

from runtime.errors import InputError
from runtime.serving.statistics import RequestRecord

LogFormat = Literal["text", "json"]
_LOG = logging.getLogger("latte_flow")
_PLAIN = re.compile(r"[\w.:@/+-]+", re.ASCII)


def set_up_logging(log_format: str) -> None:
    """Sends the service's log to stderr, one line for each message.

    Raises:
        InputError: the format is unknown.
    """
    if log_format not in get_args(LogFormat):
        raise InputError(f"log_format must be one of {', '.join(get_args(LogFormat))}, got {log_format!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else OneLineFormatter())
    _LOG.handlers = [handler]
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False


def log_request(record: RequestRecord) -> None:
    """Logs the end of a request. Neither prompts nor images are logged."""
    known = {name: value for name, value in asdict(record).items() if value not in (None, "")}
    values = {name: round(value, 4) if isinstance(value, float) else value for name, value in known.items()}
    text = " ".join(f"{name}={_quoted(value)}" for name, value in values.items())
    _LOG.info("request %s", text, extra={"fields": {"event": "request"} | values})


def _quoted(value: str | int | float) -> str:
    """Returns a value as text; one with other characters than those of a plain id is quoted, as in JSON."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class JsonFormatter(logging.Formatter):
    """One JSON object on one line: time, level, and the message or the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line |= getattr(record, "fields", None) or {"event": "log", "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class OneLineFormatter(logging.Formatter):
    """Time, level and message; a traceback's lines are joined."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{moment} latte_flow {record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info:
            text += " | " + " | ".join(self.formatException(record.exc_info).splitlines())
        # A client chooses its ids, and what an error repeats.
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
