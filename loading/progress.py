"""Progress of reading or writing a checkpoint: a callback for the code that works, a bar for the terminal."""

from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[int, int, str], None]  # (steps done, steps in total, name of the last one)


class LoadBar:
    """Draws a tqdm bar on stderr when called as a Progress; work that takes less than a second stays silent."""

    def __init__(self, title: str = "loading"):
        self.title, self.bar = title, None

    def __call__(self, done: int, total: int, name: str) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.title, unit="tensor", delay=1.0, leave=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar off the screen, at the end or after an error; the next call draws a new one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
