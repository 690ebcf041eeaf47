"""``BatchNorm``: a layer for NumPy and CuPy arrays that needs no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_bn import aliasing, registry, spec
from gpu_bn.activations import Activation
from gpu_bn.algorithm import commit
from gpu_bn.backends.protocol import Backend, Saved
from gpu_bn.call import Call, Options
from gpu_bn.folding import batch_moments
from gpu_bn.functional import batch_norm_backward, forward

Array = Any
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class BatchNorm:
    """A layer for NumPy or CuPy arrays of 2 to 5 axes, with torch's parameters, buffers and defaults.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of a batch in the running statistics; ``None`` averages over all batches so far.
        affine: whether there are ``weight`` and ``bias``.
        track_running_stats: whether there are running statistics; without them, evaluation uses those of the batch.
        device: ``None`` or ``"cpu"`` keeps parameters and statistics in NumPy arrays, ``"cuda"`` in CuPy arrays on the
            current device.
        dtype: the NumPy dtype of parameters and running statistics; float32 unless given.
        bias: whether ``affine`` includes a bias.
        activation: the activation that follows; :func:`gpu_bn.batch_norm` lists the names.
        channel_axis: the axis of the channels.
        backend: a backend's name, or ``None`` for the one that serves the arrays.
        virtual_batch_size: the size of a ghost batch, see :func:`gpu_bn.batch_norm`; no effect in evaluation mode.
        renorm: ``(r_max, d_max)`` of batch renormalisation, see there; no effect in evaluation mode.

    Attributes:
        weight: (C,), ones at first, or ``None``.
        bias: (C,), zeros at first, or ``None``.
        running_mean: (C,), zeros at first, or ``None``.
        running_var: (C,), ones at first, or ``None``.
        num_batches_tracked: 0-d int64 array, or ``None``.
        grad: gradients of the parameters by name, summed over the ``backward`` calls since ``zero_grad``.
        training: whether ``forward`` uses and tracks the statistics of the batch; set by ``train`` and ``eval``.

    Raises:
        TypeError: ``dtype`` is none of float16, bfloat16, float32 and float64, or ``activation`` is neither a name nor
            an ``Activation``.
        ValueError: the number of channels, the device or another option is invalid; the message says what was expected.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> norm = gpu_bn.BatchNorm(2, activation="relu")
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
        >>> y = norm(x)
        >>> y.round(3)
        array([[0., 0.],
               [1., 1.]], dtype=float32)
        >>> dx = norm.backward(np.ones_like(y))
        >>> norm.grad["bias"]
        array([1., 1.], dtype=float32)
        >>> norm.eval()(x).shape  # evaluation uses the running statistics
        (2, 2)

    Source: Ioffe & Szegedy 2015; the parameters are those of ``torch.nn.BatchNorm1d``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | str | None = None,
        channel_axis: int = 1,
        backend: Backend | str | None = None,
        virtual_batch_size: int | None = None,
        renorm: tuple[float, float] | None = None,
    ) -> None:
        if not isinstance(num_features, (int, np.integer)) or num_features < 0:
            raise ValueError(f"num_features should be a non-negative int, got {num_features!r}")
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device should be None, 'cpu' or 'cuda', got {device!r}")
        spec.check_options(False, 0.0 if momentum is None else momentum, eps)
        self.num_features = int(num_features)
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.activation = activation
        self.channel_axis = channel_axis
        self.backend = backend
        self.virtual_batch_size = virtual_batch_size
        self.renorm = None if renorm is None else spec.check_renorm(renorm, track_running_stats)
        self.training = True
        self.grad: dict[str, Array] = {}
        self._saved: Saved | None = None

        dtype = np.dtype(np.float32 if dtype is None else dtype)
        if dtype.name not in spec.FLOAT_DTYPES:
            raise TypeError(f"dtype should be one of {', '.join(spec.FLOAT_DTYPES)}, got {dtype.name}")
        xp: Any = registry.load("cupy").xp if device == "cuda" else np  # type: ignore[attr-defined]
        self.weight: Array | None = xp.ones(num_features, dtype) if affine else None
        self.bias: Array | None = xp.zeros(num_features, dtype) if affine and bias else None
        self.running_mean: Array | None = xp.zeros(num_features, dtype) if track_running_stats else None
        self.running_var: Array | None = xp.ones(num_features, dtype) if track_running_stats else None
        self.num_batches_tracked: Array | None = xp.zeros((), np.int64) if track_running_stats else None

    @property
    def activation(self) -> Activation:
        """The activation that follows the normalisation; it may be set to a name."""
        return self._activation

    @activation.setter
    def activation(self, activation: Activation | str | None) -> None:
        self._activation = Activation.of(activation)

    def forward(self, x: Array, residual: Array | None = None, mask: Array | None = None) -> Array:
        """Normalise ``x``. In training mode the call, including ``x``, is kept for one call of :meth:`backward`.

        Args:
            x: 2-D to 5-D, C channels along ``channel_axis``.
            residual: added before the activation; like ``x``.
            mask: which positions count; see :func:`gpu_bn.batch_norm`.

        Returns:
            ``y``, like ``x``.

        Raises:
            TypeError, ValueError: for the reasons given at :func:`gpu_bn.batch_norm`; statistics and counter have not
                changed.
        """
        y, saved = self.forward_saving(x, residual, mask)
        self._saved = saved if self.training else None
        return y

    __call__ = forward

    def forward_saving(self, x: Array, residual: Array | None = None, mask: Array | None = None) -> tuple[Array, Saved]:
        """Compute :meth:`forward`, and also return what :meth:`backward` needs, in evaluation mode too."""
        if registry.differentiable(x, None) is not None:
            raise TypeError(f"gpu_bn.{self!r} takes NumPy and CuPy arrays; for torch tensors there is gpu_bn.nn")
        batch_stats = self.training or self.running_mean is None
        counter = self.num_batches_tracked if self.training and self.track_running_stats else None
        if counter is not None:
            spec.check_counter(counter)
        momentum = self.momentum
        if momentum is None:
            with spec.on_device_of(counter):
                momentum = 1.0 / (counter + 1) if counter is not None else 0.0  # on a GPU, a 0-d array
        tracked = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        extended = (self.virtual_batch_size, self.renorm) if self.training else (None, None)
        call = Call(x, self.weight, self.bias, residual, *running, counter, mask)
        options = Options(batch_stats, momentum, self.eps, self.activation, self.channel_axis, *extended)
        return forward(call, options, self.backend)

    def backward(self, dy: Array, saved: Saved | None = None) -> Any:
        """Back-propagate through a forward call: that of ``saved``, else the last one in training mode, once.

        The gradients of the parameters are added to ``grad``.

        Returns:
            ``dx``, or ``(dx, dresidual)`` if the forward call had a residual; both like ``x``.

        Raises:
            RuntimeError: there has been no forward call in training mode since the last backward call.
        """
        kept = saved is None
        saved = saved or self._saved
        if saved is None:
            raise RuntimeError(
                "backward needs a call of forward in training mode since the last backward, or a saved call"
            )
        grads = batch_norm_backward(dy, saved, backend=self.backend)
        sums = {}
        for name, gradient in (("weight", grads.dweight), ("bias", grads.dbias)):
            if gradient is not None:
                with spec.on_device_of(gradient):
                    sums[name] = self.grad[name] + gradient if name in self.grad else gradient
        self.grad.update(sums)
        if kept:
            self._saved = None
        return grads.dx if grads.dresidual is None else (grads.dx, grads.dresidual)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle or copy: everything but the forward call kept for :meth:`backward`."""
        return self.__dict__ | {"_saved": None}

    def zero_grad(self) -> None:
        """Drop the gradients summed so far."""
        self.grad.clear()

    def parameters(self) -> dict[str, Array]:
        """Return the parameters by name, to be updated in place."""
        return {name: getattr(self, name) for name in ("weight", "bias") if getattr(self, name) is not None}

    def train(self, mode: bool = True) -> BatchNorm:
        """Use and track the statistics of the batch from now on; with ``mode=False``, the running statistics."""
        self.training = mode
        return self

    def eval(self) -> BatchNorm:
        """Use the running statistics from now on."""
        return self.train(False)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the variance to 1, the count of batches to 0."""
        self._write(running_mean=0, running_var=1, num_batches_tracked=0)

    def reset_parameters(self) -> None:
        """Reset the running statistics, and set the weight to 1 and the bias to 0."""
        self._write(running_mean=0, running_var=1, num_batches_tracked=0, weight=1, bias=0)

    def _write(self, **values: Any) -> None:
        """Write numbers or arrays to the parameters and buffers that are not ``None``: to all, or to none.

        Raises:
            ValueError: one of them is read-only, or shares memory with another.
        """
        targets = {name: array for name in values if (array := getattr(self, name)) is not None}
        with spec.on_device_of(next(iter(targets.values()), None)):
            for name, array in targets.items():
                spec.check_writeable(name, array)
                if not isinstance(values[name], int):
                    values[name] = values[name].astype(array.dtype)
            aliasing.check_written(targets, {})
            commit(list(targets.values()), [values[name] for name in targets])

    def init_identity_(self, x: Array) -> BatchNorm:
        """Make the layer the identity on a batch (followed by its activation), in training and in evaluation mode.

        This sets weight = sqrt(var + eps) and bias = mean, and the running statistics to the mean and biased variance
        of the batch. So the layer can be inserted after a trained one without changing the network (Ioffe & Szegedy
        2015, section 3).

        Raises:
            ValueError: the layer has no weight or no bias, or an array to write is read-only or shares memory.
        """
        if self.weight is None or self.bias is None:
            raise ValueError(f"an identity needs weight and bias, got {self!r}")
        moments = batch_moments(x, self.eps, channel_axis=self.channel_axis, backend=self.backend)
        spec.check_vector("weight", self.weight, len(moments.mean))
        with spec.on_device_of(self.weight):
            sd = (moments.var + self.eps) ** 0.5
        self._write(weight=sd, bias=moments.mean, running_mean=moments.mean, running_var=moments.var)
        return self

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the parameters and buffers by their names in torch."""
        return {name: getattr(self, name).copy() for name in STATE if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True) -> None:
        """Copy parameters and buffers from arrays, by their names in torch.

        A state without ``num_batches_tracked`` (from before torch 0.4.1) leaves the counter as it is.

        Raises:
            ValueError: a key is missing or unexpected (if ``strict``); an array has the wrong shape or no real numbers;
                the counter is not a whole number; a parameter or buffer is read-only. Nothing has been copied then.
        """
        own = {name: getattr(self, name) for name in STATE if getattr(self, name) is not None}
        missing = [name for name in own if name not in state and name != "num_batches_tracked"]
        unexpected = [name for name in state if name not in own]
        if strict and (missing or unexpected):
            raise ValueError(f"state of {self!r}: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}")
        values = {name: _converted(name, own[name], state[name]) for name in own if name in state}
        for name, value in values.items():
            if value.shape != own[name].shape:
                raise ValueError(f"state of {self!r}: {name} should have shape {own[name].shape}, got {value.shape}")
        self._write(**values)

    def __repr__(self) -> str:
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )
        if not self.activation.is_identity:
            text += f", activation={self.activation!r}"
        for name in ("virtual_batch_size", "renorm"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return f"{type(self).__name__}({text})"


def _converted(name: str, own: Array, value: Any) -> Array:
    """Return a value of a state as an array of real numbers in ``own``'s library.

    Raises:
        ValueError: it has a mask, or its values are not valid for the parameter or buffer ``name``.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} should be an array without a mask, got {type(value).__name__}")
    try:
        value = _as_array(own, value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} should be an array of numbers, got {type(value).__name__}: {error}") from error
    if not (value.dtype.kind in "biuf" or spec.dtype_name(value) == "bfloat16"):
        raise ValueError(f"{name} should be real numbers, got {value.dtype}")
    with spec.on_device_of(value):
        within = (value >= 0) & (value < 2.0**63)
        if name == "num_batches_tracked" and not (bool(within.all()) and bool((value == value // 1).all())):
            raise ValueError(f"{name} should be a whole number, 0 or more, got {value}")
    if spec.is_cupy(value) or not spec.is_cupy(own):
        return value
    with spec.on_device_of(own):  # a NumPy array cannot be assigned to a CuPy array
        return registry.load("cupy").xp.asarray(value)  # type: ignore[attr-defined]


def _as_array(own: Array, value: Any) -> Array:
    """Return a value as a NumPy array; a CuPy array stays one if ``own`` is one, too."""
    if hasattr(value, "detach"):  # a torch tensor; NumPy cannot convert one that requires a gradient or is bfloat16
        value = value.detach().to("cpu")
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    if not spec.is_cupy(value):
        value = np.asarray(value)
    elif not spec.is_cupy(own):
        value = value.get()
    return value
