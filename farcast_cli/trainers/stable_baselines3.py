"""A stable-baselines3 agent, `rl_model_10000_steps.zip`: a zip of torch files, and of the agent's attributes as JSON (`data`).

A step is one step of the environments together: `num_timesteps`. On-policy agents (PPO, A2C) train when a rollout ends, which
has n_steps * n_envs steps; a callback saves before that. The trainer sets the learning rate before each update, from the share
of the steps that remains; so the rates in the file need not move. What `data` holds as base64 text is a pickle of cloudpickle's:
it is carried as text, and read by nobody here.

Source: stable_baselines3/common/save_util.py, base_class.py, on_policy_algorithm.py, callbacks.py, 2.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import NoWeightsError
from farcast_cli.formats.file_kind import kind_of
from farcast_cli.formats.torch_bundle import read_bundle
from farcast_cli.formats.torch_pickle import iter_tensors
from farcast_cli.formats.tree import find
from farcast_cli.trainers.base import Evidence, Layout, Network, Part, Snapshot, Trainer, is_step, name_evidence, weights_of
from farcast_cli.trainers.by_content import is_by_content
from farcast_cli.trainers.group_marks import mark_group, marks_in_group
from farcast_cli.trainers.torch_payload import adam_evidence, other_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from farcast_cli.formats.tree import TreePath

DATA, WEIGHTS = "data", "policy.pth"
STEPS, UPDATES, REMAINING = "num_timesteps", "_n_updates", "_current_progress_remaining"
_TOTAL, _BEGAN = "_total_timesteps", "_num_timesteps_at_start"
_CLOCKED = (STEPS, UPDATES, REMAINING, _TOTAL, _BEGAN, "start_time")


def _recognises(path: Path) -> bool:
    is_zip = path.suffix == ".zip" and path.is_file() and kind_of(path) == "stable-baselines3"
    return is_zip or is_by_content(path, "stable-baselines3")


def _read(path: Path) -> Snapshot:
    file = read_bundle(path, DATA)
    weights = file.tree.get(WEIGHTS)
    if not any(True for _ in iter_tensors(weights)):
        raise NoWeightsError(f"{path}: a zip without the weights of stable-baselines3: expected tensors in {WEIGHTS}")
    tensors, rough = weights_of(file, weights)
    steps = find(file.tree, (DATA, STEPS))
    counted = (Evidence("trainer state", f"{DATA}.{STEPS}", steps),) if is_step(steps) else ()
    others = {name: tree for name, tree in file.tree.items() if name != DATA}
    return Snapshot(
        path,
        LAYOUT.name,
        (Part(path, "", "state", file, networks=(Network((WEIGHTS,)),)),),
        tensors,
        (*counted, *adam_evidence(file, others), *name_evidence(path)),
        not_streamable=rough,
        beside=tuple(other_weights(others, (WEIGHTS,))),
    )


# --- the clock -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rollouts:
    """How an on-policy agent trains: `updates` for each rollout of `size` steps, the first of which began at step `began`."""

    size: int
    began: int
    updates: int
    is_behind: bool
    """Whether a snapshot at a rollout's end was saved behind its updates, not before them as by a callback."""

    def ended(self, step: int) -> int:
        """How many have been trained on by a step."""
        return (step - self.began - (not self.is_behind)) // self.size

    def explains(self, states: Sequence[tuple[int, dict[str, Any]]]) -> bool:
        """Whether the updates of all snapshots of this stretch of training, and their place in the run, follow from it."""
        origin, last = states[-1]
        return all(
            last[UPDATES] - data[UPDATES] == self.updates * (self.ended(origin) - self.ended(step))
            and (not self.ended(step) or _last_seen(data) in {None, self.began + self.size * self.ended(step)})
            for step, data in states
            if data.get(_BEGAN) == self.began
        )


def _last_seen(data: dict[str, Any]) -> int | None:
    """The step at which the trainer last computed what remains of the run; None where that cannot be told."""
    total, remaining = data.get(_TOTAL), data.get(REMAINING)
    return round((1 - remaining) * total) if is_step(total) and total and isinstance(remaining, float) else None


def read_rollouts(states: Sequence[tuple[int, dict[str, Any]]]) -> Rollouts | None:
    """The rollouts of a run, by its agents' attributes, the origin last; None where they do not explain its updates."""
    data = states[-1][1]
    num_steps, num_envs, epochs = (data.get(key, default) for key, default in (("n_steps", 0), ("n_envs", 0), ("n_epochs", 1)))
    if not (is_step(num_steps) and is_step(num_envs) and is_step(epochs) and num_steps * num_envs * epochs):
        return None
    if "gae_lambda" not in data or data.get("target_kl") is not None:
        return None  # off-policy agents have no rollouts, and a limit on the divergence ends updates early
    found = (Rollouts(num_steps * num_envs, data[_BEGAN], epochs, is_behind) for is_behind in (False, True))
    return next((one for one in found if one.explains(states)), None)


@dataclass(frozen=True, slots=True)
class AgentClock:
    """From the origin's counts to the valid step's."""

    rollouts: Rollouts | None
    origin: dict[str, Any]
    step: int

    @property
    def paths(self) -> tuple[TreePath, ...]:
        left = () if self.rollouts else (UPDATES,)
        return tuple((DATA, key) for key in _CLOCKED if key not in left)

    @property
    def epoch_ends(self) -> list[int]:
        """Rollouts begin anew at the step that the agent resumes from."""
        if not self.rollouts:
            return []
        size, now = self.rollouts.size, self.origin[STEPS]
        below = (self.step - self.rollouts.began) // size * size + self.rollouts.began - now
        return [horizon for horizon in (below, below + size) if horizon > 0]

    @property
    def more_rollouts(self) -> int:
        return self.rollouts.ended(self.step) - self.rollouts.ended(self.origin[STEPS]) if self.rollouts else 0

    def move(self, tree: Any) -> list[tuple[str, int, int]]:
        data = tree[DATA]
        new: dict[str, Any] = {STEPS: self.step} | self._remaining()
        if self.rollouts:
            new[UPDATES] = data[UPDATES] + self.rollouts.updates * self.more_rollouts
        changes = [(f"{DATA}.{key}", data[key], value) for key, value in new.items() if data.get(key) != value]
        data.update(new)
        return changes

    def _remaining(self) -> dict[str, float]:
        """The share of the run that remained at the last update, as the trainer computes it."""
        seen = _last_seen(self.origin)
        if seen is None:
            return {}
        moved = self.rollouts.size * self.more_rollouts if self.rollouts else self.step - self.origin[STEPS]
        return {REMAINING: 1.0 - float(seen + moved) / float(self.origin[_TOTAL])}

    def notes(self, _: str, __: Any) -> Iterator[str]:
        total = self.origin.get(_TOTAL)
        if is_step(total) and total > self.step:
            yield (
                f"learn({total - self.step}, reset_num_timesteps=False) resumes and ends at step {total};"
                " the learning rate follows from these two"
            )

    def schedule_count(self, _: TreePath) -> None:
        """No schedule is saved: the trainer computes its rates."""

    def optimizer_count(self, count: float) -> int | None:
        """An optimiser's steps, which are as many for each rollout."""
        if not self.rollouts or not self.origin[UPDATES]:
            return None
        done, rest = divmod(self.origin[UPDATES], self.rollouts.updates)
        each, left = divmod(int(count), done) if done and not rest else (0, 1)
        return None if left else int(count) + each * self.more_rollouts


def _clock(states: Sequence[tuple[int, Any]], target: int) -> AgentClock | None:
    known = [(step, tree[DATA]) for step, tree in states if _wrote(tree)]
    if not known or known[-1][0] != states[-1][0] or not is_step(known[-1][1].get(_BEGAN)):
        return None
    return AgentClock(read_rollouts(known), dict(known[-1][1]), target)


def _data(snapshot: Snapshot) -> dict[str, Any]:
    return find(getattr(snapshot.parts[0].content, "tree", None), (DATA,)) or {}


def _end(snapshot: Snapshot) -> tuple[str, int] | None:
    """Where `learn` ends; a later call of it begins another stretch of training, with an end of its own."""
    total = _data(snapshot).get(_TOTAL)
    return (f"{snapshot.path} says {DATA}.{_TOTAL}", total) if is_step(total) and total else None


def _formula(snapshot: Snapshot) -> Callable[[int], float] | None:
    """A rate in proportion to the share of the run that remains, the usual schedule, if snapshots lie alike in their rollouts."""
    data = _data(snapshot)
    seen, steps = _last_seen(data), data.get(STEPS)
    if seen is None or not is_step(steps):
        return None
    return lambda step: max(0.0, 1.0 - (step - steps + seen) / data[_TOTAL])


def _wrote(tree: object) -> bool:
    return is_step(find(tree, (DATA, STEPS))) and is_step(find(tree, (DATA, UPDATES)))


TRAINER = Trainer(
    wrote=_wrote,
    clock=_clock,
    end=_end,
    formula=_formula,
    computes_rates=True,
    needs_optimizer="stable-baselines3 cannot load an agent without its optimizers",
    mark=mark_group,
    marks=marks_in_group,
    has_own_files=True,
)
LAYOUT = Layout("stable-baselines3", _recognises, _read, names_are_steps=False, trainer=TRAINER)
