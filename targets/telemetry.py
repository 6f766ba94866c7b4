"""Libraries that would phone home are told not to, before any of them is imported."""

from __future__ import annotations

import os

# variable -> who reads it
SWITCHES = {
    "DO_NOT_TRACK": "huggingface_hub and others (donottrack.sh)",
    "HF_HUB_DISABLE_TELEMETRY": "huggingface_hub, through which transformers and peft count their use",
    "ORT_DISABLE_TELEMETRY": "onnxruntime",
}


def switch_off() -> None:
    """Set what is not set; children inherit it. What a user set stays."""
    for name in SWITCHES:
        os.environ.setdefault(name, "1")
