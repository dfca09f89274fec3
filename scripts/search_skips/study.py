"""The memory of `scripts.search_skips`: finished trials in an optuna study in a file, and what to try next.

Only finished trials are written, each by one transaction, so a killed search leaves no half one behind. What comes
next depends on the finished trials and a seed alone: `propose` makes a study and a sampler anew each time. So a search
that goes on tries what it would have tried without the kill. optuna is optional: it is imported where it is used.
"""

import importlib.util
import json
import random
import sqlite3
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import UserError
from scripts.common.journal import refuse_others

SAMPLERS = {"gp": ("optuna", "scipy"), "tpe": ("optuna",)}  # and what they need
NAME = "skip_sets"  # of the study in the file


@dataclass(frozen=True)
class Trial:
    """A set that was tried. keep [2L]: whether it runs attention and MLP of each layer in turn.

    agreement: the share of positions at which its first draft says what the full model does. proxy: the speedup over
    plain decoding that this and the cost of a round promise with num_draft_tokens, the K that promises most. value: the
    same from the tokens per round of real decoding, or the proxy where nothing was decoded. seconds: of decoding.
    exit_layer: of a static exit, a set that leaves out everything above.
    """

    keep: tuple[bool, ...]
    num_draft_tokens: int
    agreement: float
    proxy: float
    value: float
    exit_layer: int | None = None
    tokens_per_round: float | None = None
    acceptance_rate: float | None = None
    seconds: float | None = None

    @property
    def decoded(self) -> bool:
        """Tell whether it was promising enough to be decoded with."""
        return self.tokens_per_round is not None


def check_installed(sampler: str) -> None:
    """Raise UserError unless the packages behind a sampler are there."""
    if absent := [name for name in SAMPLERS[sampler] if importlib.util.find_spec(name) is None]:
        raise UserError(f"the search needs {' and '.join(absent)}: pip install {' '.join(absent)}")


def sublayer_names(n_sublayers: int) -> list[str]:
    """List attention_0, mlp_0, attention_1, …"""
    return [f"{('attention', 'mlp')[i % 2]}_{i // 2}" for i in range(n_sublayers)]


def frozen(trial: Trial, attrs: dict | None = None):
    """Make optuna's trial of one of ours. attrs: to be kept with it; without any, one that a sampler may learn from."""
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState, create_trial

    names = sublayer_names(len(trial.keep))
    # To a sampler a screened trial is as good as a decoded one: GPSampler would not see pruned ones at all.
    state = TrialState.COMPLETE if trial.decoded or attrs is None else TrialState.PRUNED
    return create_trial(
        state=state,
        value=trial.value,
        params=dict(zip(names, trial.keep, strict=True)),
        distributions=dict.fromkeys(names, CategoricalDistribution((False, True))),
        user_attrs=attrs or {},
        intermediate_values={0: trial.proxy} if attrs else {},
    )


def propose(tried: Sequence[Trial], sampler: str, seed: str) -> tuple[bool, ...]:
    """Ask a sampler what to try next; a function of its arguments alone. tried: one trial at least."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    number = random.Random(seed).getrandbits(32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        chosen = (
            optuna.samplers.GPSampler(seed=number)
            if sampler == "gp"
            else optuna.samplers.TPESampler(seed=number, multivariate=True)
        )
        study = optuna.create_study(direction="maximize", sampler=chosen)
        history = [frozen(trial) for trial in tried]
        study.add_trials(history)
        params = study.ask(history[0].distributions).params
    return tuple(params[name] for name in sublayer_names(len(tried[0].keep)))


class Store:
    """The trials of a search in their order, and facts about it, in an sqlite file that optuna's tools read, too.

    Attributes: trials, those finished so far; path.
    """

    def __init__(self, path: Path, settings: dict):
        """Open or make the file. Raises UserError if it is of other settings or nothing that optuna wrote."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.path, settings = path, json.loads(json.dumps(settings))
        try:
            with closing(sqlite3.connect(path)) as file:
                file.execute("pragma quick_check").fetchall()  # optuna would fail in many ways on anything else
            self.study = optuna.create_study(
                study_name=NAME, storage=f"sqlite:///{path}", direction="maximize", load_if_exists=True
            )
            known = self.get("settings")
            self.trials = [self._read(trial) for trial in self.study.get_trials(deepcopy=False)]
        except (sqlite3.Error, RuntimeError, KeyError, TypeError, optuna.exceptions.OptunaError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{path} is not what this program writes ({type(error).__name__}: {reason}): give another --output_dir"
            ) from None
        if known is None:
            self.set("settings", settings)
        else:
            refuse_others(path, known, settings)

    @staticmethod
    def _read(trial) -> Trial:
        return Trial(tuple(trial.params[name] for name in sublayer_names(len(trial.params))), **trial.user_attrs)

    def add(self, trial: Trial) -> None:
        attrs = asdict(trial)
        del attrs["keep"]  # the parameters say it
        self.study.add_trial(frozen(trial, attrs))
        self.trials.append(trial)

    def get(self, name: str):
        """Return a fact about the search; None if it is not known."""
        return self.study.user_attrs.get(name)

    def set(self, name: str, value) -> None:
        self.study.set_user_attr(name, value)
