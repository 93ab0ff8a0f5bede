"""`python -m shortv_llava.evaluation`: the same as `shortv evaluate`, for `accelerate launch -m`."""

from shortv_llava.cli import main

if __name__ == "__main__":
    main("evaluate")
