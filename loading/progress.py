"""How far loading or writing a checkpoint has come: a callback for the code that works, a bar for the terminal."""

from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[int, int, str], None]  # (steps done, steps in total, name of the last one)


class LoadBar:
    """A Progress that draws a tqdm bar on stderr; silent for models that load at once."""

    def __init__(self, title: str = "loading"):
        self.title, self.bar = title, None

    def __call__(self, done: int, total: int, name: str) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.title, unit="tensor", delay=1.0, leave=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()
            self.bar = None
