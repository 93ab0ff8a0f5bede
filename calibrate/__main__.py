"""`python -m shortv_llava.calibrate`: the same as `shortv calibrate`, for `accelerate launch -m`."""

from shortv_llava.cli import main

if __name__ == "__main__":
    main("calibrate")
