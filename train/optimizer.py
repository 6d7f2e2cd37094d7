"""What takes a step: Muon for matrices, AdamW for other weights; the schedule; the length of a run."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import BudgetConfig, OptimizerConfig, ScheduleConfig
from engine.model import Linear
from engine.runtime import Runtime
from train.parallel import exchange_rows, local, share_like, sum_of_shares

Polynomials = tuple[tuple[float, float, float], ...]
# Polynomials a x + b x^3 + c x^5, one after another, which bring singular values of 0.001 to 1 near 1 faster than one
# polynomial over and over: the first five of Polar Express (Amsel et al., arXiv:2505.16932), all but the last for x
# divided by MARGIN, as there. Each has a steep slope at the largest x that it is for. There the rounding of bf16, 0.4%,
# would grow twentyfold with each polynomial: a matrix of rank one, say, would end at infinity.
MARGIN = 1.02
POLAR_EXPRESS = (
    *(
        (a / MARGIN, b / MARGIN**3, c / MARGIN**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        )
    ),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


class Budget:
    """The length of a run in steps or in time. The fraction that is over drives the schedule and the evaluations."""

    def __init__(self, config: BudgetConfig, tokens_per_step: int, steps_per_epoch: float) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.seconds = 60 * (config.minutes or 0.0)
        self.steps: int | None = None
        if config.steps is not None:
            self.steps = config.steps
        elif config.tokens is not None:
            self.steps = math.ceil(config.tokens / tokens_per_step)
        elif config.epochs is not None:
            self.steps = max(1, round(config.epochs * steps_per_epoch))

    def progress(self, step: int, seconds: float) -> float:
        """Return the fraction of the run that is over after `step` steps and `seconds`; 1 or more at its end."""
        return seconds / self.seconds if self.steps is None else step / self.steps

    def seconds_left(self, step: int, seconds: float, seconds_per_step: float) -> float:
        if self.steps is None:
            return max(0.0, self.seconds - seconds)
        return max(0, self.steps - step) * seconds_per_step

    def describe(self) -> str:
        return f"{self.seconds / 60:g} minutes" if self.steps is None else f"{self.steps:,} steps"


def rate_factor(config: ScheduleConfig, progress: float) -> float:
    """Return the share of the peak learning rate at `progress`, the share of the run that is over (0 to 1)."""
    if progress < config.warmup:
        # A rate of 0 would waste the first step.
        return max(progress / config.warmup, 0.01)
    if config.shape == "cosine":
        rest = (progress - config.warmup) / (1 - config.warmup)
        return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * min(rest, 1.0))) / 2
    if progress < 1 - config.decay:
        return 1.0
    return config.floor + (1 - config.floor) * max(0.0, (1 - progress) / config.decay)


def muon_dtype(runtime: Runtime) -> torch.dtype:
    """Return the type in which Muon multiplies: bf16 where that is native, as it is meant to; fp16 would overflow."""
    return torch.bfloat16 if runtime.precision == "bf16" else torch.float32


class Muon(torch.optim.Muon):
    """PyTorch's Muon (Jordan et al. 2024), with all matrices of one shape orthogonalised in one batch.

    State, arguments and arithmetic are those of torch.optim.Muon; only how it is carried out differs. PyTorch's works
    on one matrix at a time, always in bf16: a launch-bound loop on a GPU, and on a CPU without bf16 units about 90
    times slower than fp32 (0.9 against 86 GFLOP/s, measured). Here `dtype` says what to multiply in. A parameter group
    may say of how many rows each are the maps that are stacked in its matrices (`parts`: query, key and value, say):
    each is treated on its own.
    """

    def __init__(self, params: Iterable[Any], *, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(params, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step_batch(group, parameters)

    def _step_batch(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        updates = self._momentum(group, parameters)
        polynomials = (group["ns_coefficients"],) * group["ns_steps"]
        directions = self._directions(group, parameters[0], updates, polynomials)
        self._apply(group, parameters, directions)

    def _momentum(self, group: dict[str, Any], parameters: list[Tensor]) -> Sequence[Tensor]:
        """Return this process's shares of the gradients, made steadier by momentum."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        return torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers

    def _directions(
        self, group: dict[str, Any], like: Tensor, updates: Sequence[Tensor], polynomials: Polynomials
    ) -> Tensor:
        # Of a sharded matrix each process holds and updates some rows. But singular values belong to a whole matrix:
        # the processes exchange rows for whole matrices, orthogonalise a few of these each, and exchange them back.
        matrices = exchange_rows(torch.stack([*updates]), like, len(updates))
        iteration = (polynomials, group["eps"], self.dtype)
        directions = _orthogonalise_parts(matrices, group.get("parts", (like.shape[0],)), *iteration)
        return exchange_rows(directions, like, len(updates), back=True)

    def _apply(self, group: dict[str, Any], parameters: list[Tensor], directions: Tensor) -> None:
        shares = [local(parameter) for parameter in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(shares, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(shares, list(directions), alpha=-group["lr"])


class NorMuon(Muon):
    """Muon whose every row of a matrix takes steps of one length (Li et al., arXiv:2510.05491), for tables as well.

    A row is what one neuron, or one token, reads or writes. It is divided by its running root mean square, so that rows
    with rare or small gradients learn as fast as others. A rate is then by how much the entries of a table change, as
    in AdamW; those of a map change by the rate over the root of its inputs, which is as much as in Muon.

    In groups that are a `table` (embedding or head: a row for each token, few columns) the columns of an update are
    made orthogonal by their Gram matrix alone. Hidden states have a large part in common; without this the gradients
    of all rows are mostly of that.
    """

    def _step_batch(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        updates, like = self._momentum(group, parameters), parameters[0]
        if group["table"]:
            roots = [equaliser(sum_of_shares(update.mT @ update, like)) for update in updates]
            tables = torch.stack([*updates]) if len(updates) > 1 else updates[0][None]
            directions = tables @ torch.stack(roots)
        else:
            directions = self._directions(group, like, updates, POLAR_EXPRESS)
        inputs = like.shape[1]
        squares = torch.linalg.vecdot(directions, directions).div_(inputs)[..., None]
        means = [local(self._row_square(each, square)) for each, square in zip(parameters, squares, strict=True)]
        torch._foreach_lerp_(means, list(squares), 1 - group["row_decay"])
        lengths = torch.stack(means).sqrt_().clamp_(min=1e-12)
        if not group["table"]:
            lengths *= inputs**0.5
        self._apply(group, parameters, directions.div_(lengths))

    def _row_square(self, parameter: Tensor, square: Tensor) -> Tensor:
        """Return the running mean square of a parameter's rows, which begins with the first one. [rows, 1]"""
        state = self.state[parameter]
        if "row_square" not in state:
            state["row_square"] = parameter.detach().sum(1, keepdim=True)  # to be sharded as the parameter is
            local(state["row_square"]).copy_(square)
        return state["row_square"]


def _orthogonalise_parts(matrices: Tensor, parts: tuple[int, ...], *iteration: Any) -> Tensor:
    """Return the directions of maps of so many rows each, which are stacked in [K, rows, columns].

    A map with more rows than columns takes a longer step, as in torch.optim.Muon.
    """
    rows, columns = parts[0], matrices.shape[-1]
    if len(set(parts)) > 1:
        return torch.cat(
            [_orthogonalise_parts(part, (part.shape[1],), *iteration) for part in matrices.split(parts, 1)], 1
        )
    directions = orthogonalise(matrices.reshape(-1, rows, columns), *iteration).reshape(matrices.shape)
    return directions if rows <= columns else directions.mul_((rows / columns) ** 0.5)


def orthogonalise(matrices: Tensor, polynomials: Polynomials, eps: float, dtype: torch.dtype) -> Tensor:
    """Push the singular values x of each matrix in [K, rows, columns] towards 1, by a x + b x^3 + c x^5 for a, b, c of
    each polynomial (a Newton-Schulz iteration)."""
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def equaliser(gram: Tensor) -> Tensor:
    """Return about gram^-1/2, [C, C]: a matrix with this Gram matrix, times it, has singular values near 1.

    The iteration of `orthogonalise` with other polynomials, whose every product is of [C, C]: a polynomial of a
    matrix's singular values is that matrix times a polynomial of its Gram matrix.
    """
    # The trace is at least the largest eigenvalue.
    scale = gram.trace().clamp(min=torch.finfo(gram.dtype).tiny)
    gram, root = gram / scale, torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for a, b, c in POLAR_EXPRESS:
        now = root @ gram @ root
        root = torch.addmm(root, root, torch.addmm(now, now, now, beta=b, alpha=c), beta=a)
    return root / scale.sqrt()


class Optimizer:
    """The optimizers of a model as one, with a state that a checkpoint can hold.

    In half precision a `scaler` multiplies the loss, so that small gradients do not vanish. Where one overflows, it
    leaves the step out and lowers its scale; so it finds its level. Without a scaler nothing is multiplied.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        matmul_dtype: torch.dtype,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        learning = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in learning.items()}
        roles = ("embedding", "head", "norm", "critic", "adapter", "matrix")
        groups: dict[str, list[nn.Parameter]] = {role: [] for role in roles}
        for name, parameter in learning.items():
            groups[_role(name, parameter)].append(parameter)
        # Weight decay would shrink the embeddings of rare words, and the channels of a norm: only matrices decay.
        decays = dict.fromkeys(groups, 0.0) | {"matrix": config.weight_decay}
        by_muon = {"muon": ("matrix",), "normuon": ("matrix", "embedding", "head")}.get(config.kind, ())
        options = {
            role: {"lr": getattr(config, f"{role}_rate"), "weight_decay": decays[role]}
            for role, parameters in groups.items()
            if parameters
        }
        adam = [{"params": groups[role], **each} for role, each in options.items() if role not in by_muon]
        self.optimizers: list[torch.optim.Optimizer] = []
        if adam:
            self.optimizers += [torch.optim.AdamW(adam, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)]
        stacked = {each.weight: each.outputs for each in model.modules() if isinstance(each, Linear)}
        muon: list[dict[str, Any]] = []
        for role in by_muon:
            by_parts: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for each in groups[role]:
                by_parts.setdefault(stacked[each] if role == "matrix" else (), []).append(each)
            muon += [{"params": those, "parts": parts, **options[role]} for parts, those in by_parts.items()]
        if muon and config.kind == "muon":
            self.optimizers.append(Muon(muon, dtype=matmul_dtype, momentum=config.momentum))
        elif muon:
            for group in muon:
                group |= {"table": not group["parts"], "row_decay": config.beta2}
                group |= {"momentum": config.beta1 if group["table"] else config.momentum}
            self.optimizers.append(NorMuon(muon, dtype=matmul_dtype))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]

    def set_rate(self, factor: float) -> None:
        """Set every learning rate to `factor` times its peak."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to a norm of `limit` where it is larger. Return the norm that they had."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(list(self.names), limit)

    @property
    def scaling(self) -> bool:
        """Return whether the loss is scaled, and the scale can still be lowered."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def step(self, *, skip: bool = False) -> None:
        """Change the weights; or `skip` the step, because its gradients are not finite, and adapt the scale alone."""
        for optimizer in self.optimizers:
            if not skip:
                self.scaler.step(optimizer)
        self.scaler.update()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor of the optimizers' state, by `parameter/entry`."""
        return {
            f"{self.names[parameter]}/{entry}": tensor
            for optimizer in self.optimizers
            for parameter, entries in optimizer.state.items()
            for entry, tensor in entries.items()
        }

    def load_state(self, state: dict[str, Tensor], scaler: dict[str, Any] | None = None) -> None:
        if scaler:
            self.scaler.load_state_dict(scaler)
        owners = {
            self.names[parameter]: (optimizer, parameter)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for key, tensor in state.items():
            name, _, entry = key.rpartition("/")
            optimizer, parameter = owners[name]
            # Fused AdamW counts its steps on the device of the parameter.
            own = share_like(parameter, tensor) if tensor.ndim == parameter.ndim else tensor
            optimizer.state[parameter][entry] = own.to(parameter.device, copy=True)


def _role(name: str, parameter: nn.Parameter) -> str:
    # Where a policy and a critic are trained together, their names stand before those of their parameters.
    if name.startswith("critic."):
        return "critic"
    if "lora_" in name:  # Muon, at its best rate, learns them no better than AdamW
        return "adapter"
    if parameter.ndim < 2:
        return "norm"
    return "matrix" if "blocks." in name else name.split(".")[-2]
