"""Bandwidth between the devices of a program.

| group of devices | bytes/s that each device can receive |
|---|---|
| TPUs | one link for each axis of the slice along which they lie, two if the axis is a ring |
| GPUs on one host | all links to the switch |
| GPUs on several hosts | one network adapter for each of the group's GPUs on a host |

The members of a group are assumed to fill the axes along which they lie, and groups not to share
links. A GPU's collectives are rings, as many as the group has GPUs on a host, each of which enters
every host once; so all data cross the adapters.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from mmsr1_jax.apps.plan.collectives import Groups
from mmsr1_jax.apps.plan.targets import Chip, Target


@dataclasses.dataclass(frozen=True)
class Network:
    """The links between the devices of a program.

    Attributes:
      target: The whole target, of which a program may use a part.
      devices: Devices of the program, in the order that its groups refer to: that of its mesh.
    """

    target: Target
    devices: Sequence[Any]

    @property
    def chip(self) -> Chip:
        """Kind of the devices."""
        return self.target.chip

    def bandwidth(self, groups: Groups) -> float:
        """Return the bytes/s that a device receives, in the slowest group."""
        members = [[self.devices[i] for i in group] for group in groups] or [list(self.devices)]
        return min(self._group_bandwidth(group) for group in members)

    def _group_bandwidth(self, group: Sequence[Any]) -> float:
        chip = self.chip
        if chip.platform == "tpu":
            return chip.links / chip.num_links * self._links(group)
        per_host = collections.Counter(device.process_index for device in group)
        if len(per_host) == 1:
            return chip.links
        return min(chip.links, chip.network * min(per_host.values()))

    def _links(self, group: Sequence[Any]) -> int:
        """Return the number of links over which a TPU receives from others of its group."""
        links = 0
        for axis, size in enumerate(self.target.shape):
            extent = len({device.coords[axis] for device in group})
            is_ring = extent == size and size % self.chip.ring == 0
            links += 0 if extent == 1 else 1 + is_ring
        return max(1, min(links, len(group) - 1))
