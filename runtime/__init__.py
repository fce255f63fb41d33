"""Runs bundles without torch."""

import os

# Since 1.29 ONNX Runtime's own packages for Linux send the names and sizes of models, and times, to Microsoft. The
# variable is read once, when ONNX Runtime is imported; `disable_telemetry_events` would come too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
