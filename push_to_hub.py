"""Publish a package folder: `python push_to_hub.py FOLDER OWNER/NAME`, the same as `shortv push`."""

from shortv_llava.hub.push import push, push_space

__all__ = ["push", "push_space"]

if __name__ == "__main__":
    from shortv_llava.cli import main

    main("push")
