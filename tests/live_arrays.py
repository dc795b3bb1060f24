"""Memory of JAX arrays on a device."""

import gc

import jax


class LiveArrays:
    """Counter of the bytes in the first device's memory of arrays that were created since."""

    def __init__(self):
        gc.collect()
        self._known = jax.live_arrays()  # kept, so that no new array gets the id of one of them
        self._ids = {id(array) for array in self._known}

    def bytes(self) -> int:
        gc.collect()
        device, shards = jax.devices()[0], {}
        for array in jax.live_arrays():
            on_device = device in array.sharding.device_set
            if array.sharding.memory_kind == "pinned_host" or id(array) in self._ids:
                continue
            if on_device and not array.is_deleted():  # others may be donated meanwhile
                for shard in array.addressable_shards:
                    if shard.device == device:
                        shards[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        return sum(shards.values())
