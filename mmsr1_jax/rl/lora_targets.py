"""The linear maps that can have an adapter (`rl/lora.py`), by the names that settings use.

Apart, since settings are read where there is no model.
"""

TARGETS: dict[str, tuple[str, ...]] = {
    **{name: ("text", "layers", "attention", name) for name in ("q", "k", "v", "out")},
    **{name: ("text", "layers", "mlp", name) for name in ("gate", "up", "down")},
    **{f"vision.{name}": ("vision", "blocks", "attention", name) for name in ("qkv", "out")},
    **{f"vision.{name}": ("vision", "blocks", "mlp", name) for name in ("gate", "up", "down")},
}
TEXT_TARGETS = tuple(name for name in TARGETS if not name.startswith("vision."))
