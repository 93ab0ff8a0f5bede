"""The embedded LLaVA: its data (`shapes`), its training (`train`) and the trained checkpoint (`shapes-llava/`)."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "shapes-llava"
