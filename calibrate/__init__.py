"""Layer Contribution (LC) scores and the choice of layers."""


def __getattr__(name: str):
    if name == "layer_contribution":  # imported on use, as in the package above
        from shortv_llava.calibrate.contribution import layer_contribution

        return layer_contribution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
