"""Which part of a job one of several hosts does."""

from __future__ import annotations

import dataclasses
import re

from ecg_jax.errors import UserError

_NUMBER = "0|[1-9][0-9]{0,8}"
_FOLDER = re.compile(rf"shard-({_NUMBER})-of-({_NUMBER})")
_TEXT = re.compile(rf"({_NUMBER})/({_NUMBER})")


@dataclasses.dataclass(frozen=True, order=True)
class Shard:
    """Every `count`-th unit, from unit `index` on."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n".

        Raises:
          UserError: it is something else, or i is not one of 0 to n - 1.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            unset = "; is SLURM_ARRAY_TASK_ID set, as inside an array job?" if text.startswith("/") else "."
            raise UserError(
                f"--shard is i/n, one of the numbers 0 to n-1 and how many shards there are, as in 3/64, not "
                f"{text!r}{unset}"
            )
        shard = cls(int(match[1]), int(match[2]))
        if shard.index >= shard.count:
            raise UserError(
                f"--shard={text} does not exist: {shard.count} shards are numbered from 0 to {shard.count - 1}"
                + (f", so submit --array=0-{shard.count - 1}." if shard.count else ".")
            )
        return shard

    @classmethod
    def from_folder(cls, name: str) -> Shard | None:
        """The shard a folder in `.partial/` belongs to; None for another name."""
        match = _FOLDER.fullmatch(name)
        return match and cls(int(match[1]), int(match[2]))

    @property
    def folder(self) -> str:
        """Name of its folder in `.partial/`."""
        return f"shard-{self.index}-of-{self.count}"

    def units(self, n_units: int) -> range:
        """Its units, of so many."""
        return range(self.index, n_units, self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


# What a call without --shard does.
WHOLE = Shard(0, 1)


def shards_of(units: list[int], count: int, most: int = 16) -> str:
    """The shards that do these units, as in "--shard=3/64, 7/64"; at most so many by name."""
    indices = sorted({unit % count for unit in units})
    named = ", ".join(f"{index}/{count}" for index in indices[:most])
    return f"--shard={named}" + (f" and {len(indices) - most} more" if len(indices) > most else "")
