"""Several devices on a machine that has none: tensors that say where they would be, and may not meet elsewhere."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class PretendedDevices(TorchFunctionMode):
    """In this context tensors stay in the CPU's memory but have the device that they were made on or moved to.

    An operation on tensors of two devices raises an error, as on real ones; so does an index from another accelerator.
    Tensors of no dimension and indices may come from the CPU.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return device_of(args[0])
        if name in ("to", "cpu"):
            return moved(*args, **kwargs) if name == "to" else moved(args[0], "cpu")
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = "cpu"
            return tree_map(lambda leaf: place(leaf, torch.device(target)), function(*args, **kwargs))
        device = common_device(name, args, kwargs)
        return tree_map(lambda leaf: place(leaf, device), function(*args, **kwargs))


def device_of(tensor) -> torch.device:
    return getattr(tensor, "pretended_device", torch.device("cpu"))


def place(leaf, device):
    if isinstance(leaf, torch.Tensor):
        leaf.pretended_device = device
    return leaf


def moved(tensor, *args, non_blocking=False, **kwargs):
    """`Tensor.to`. The same tensor where there is nothing to do, as on real devices."""
    wanted = [argument for argument in (*args, kwargs.pop("device", None)) if argument is not None]
    device, others = device_of(tensor), []
    for argument in wanted:
        if isinstance(argument, (torch.device, str)):
            device = torch.device(argument)
        elif isinstance(argument, torch.Tensor):
            device, others = device_of(argument), [*others, argument.dtype]
        else:
            others.append(argument)
    converted = tensor.to(*others, **kwargs) if others or kwargs else tensor
    if converted is tensor and device == device_of(tensor):
        return tensor
    return place(converted.view_as(converted), device)


def common_device(name, args, kwargs) -> torch.device:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = {device_of(tensor) for tensor in tensors if tensor.dim() or device_of(tensor).type != "cpu"}
    if name in ("__getitem__", "__setitem__", "index_put", "index_put_"):
        devices = {device_of(args[0])} | {device for device in devices if device.type != "cpu"}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: tensors on different devices, {sorted(map(str, devices))}")
    return devices.pop() if devices else torch.device("cpu")
