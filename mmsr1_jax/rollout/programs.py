"""The compiled programs of an engine over one parameter tree and the KV cache.

    load           convert the trainer's parameters to the engine's layout and dtype
    encode         encode images into image tokens, kept in a store shared by all episodes
    extend         write tokens (and image tokens from the store) into some lanes
    decode         run several decoding steps for some lanes
    fork           copy the partly filled page of a prompt
    read_pages     copy some pages out of the cache; `write_pages` writes them back

The engine's parameters are the trainer's with layers as separate arrays, so that programs read
weights where they are (`Policy.unstack`).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.image_rows import ImageRows, abstract_images
from mmsr1_jax.models.paged_attention import PagedRows
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.rollout import cache, decode, placement
from mmsr1_jax.rollout.sampler import Sampling

# Positions of the arguments of a program that are the same for all engines: parameters and tables.
SHARED = {"load": (0,), "encode": (0,), "extend": (0,), "decode": (0, 3, 4)}
PAGES_PER_MOVE = 16  # pages that one call of `read_pages` or `write_pages` moves


@dataclasses.dataclass(frozen=True)
class Call:
    """A program with abstract arguments, to compile it without running it.

    Attributes:
      name: Name of the program, with its length if it has several.
      program: The jitted function.
      args, keywords: Its arguments; arrays are `jax.ShapeDtypeStruct` with shardings.
    """

    name: str
    program: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)


class Programs:
    """Jitted programs of an engine; each is compiled on its first call with a shape.

    They must be called within `context`.

    Args:
      model: The policy as the trainer has it, with stacked layers; concrete or abstract arrays with
        shardings.
      config: All settings; only `rollout`, `buckets` and `turns` are used.
      states: Number of states of the stop automaton.
      running: `stop.StopTable.running`.

    Attributes:
      dtype: Compute dtype.
      num_engines: Number of engines that run a program together.
      layout: Sharding of each of the engine's parameters.
      trainer_layout: Sharding of each parameter of `model`.
      replicated: Sharding of an array on all devices of the engine.
      pages_per_lane: Maximum number of pages of a lane.
      num_pages: Number of pages of the cache.
      num_lanes: Number of lanes of the cache: those of the engine, and one for the hidden state of
        a prompt whose group has episodes without a lane.
    """

    num_engines: int = 1

    def __init__(self, model: Policy, config: settings.Config, *, states: int, running: int):
        self.config, self._model_config, self.dtype = config.rollout, model.config, model.dtype
        self._windows, self._states, self._running = config.buckets.image_windows, states, running
        size, self.num_lanes = self.config.page_size, self.config.lanes + 1
        self.pages_per_lane = -(-config.turns.max_episode_tokens // size)
        # One page more than all lanes can fill, for the copy of a prompt's last page.
        self.num_pages = self.config.lanes * self.pages_per_lane + 1
        if self.config.cache_tokens:
            self.num_pages = self.config.cache_tokens // size
        self._trainer_graph, params = nnx.split(model)
        self.trainer_layout = jax.tree.map(lambda x: x.sharding, params)
        self._trainer_params = sharding.with_shardings(params, self.trainer_layout)
        first = jax.tree.leaves(self.trainer_layout)[0]
        self.replicated: Sharding = placement.replicated(first)
        mesh = first.mesh if isinstance(first, NamedSharding) else None
        self._mesh: Mesh | None = mesh if isinstance(mesh, Mesh) else None
        with self.context():
            self._on_cpu = sharding.platform() == "cpu"
            self._graph, self._params = nnx.split(nnx.eval_shape(self._unstacked, params))
            self.layout = self._params_layout(first)
            self._cache_layout = placement.cache_shardings(jax.eval_shape(self._empty)[0], first)
            self._define()

    def _params_layout(self, first: Sharding) -> nnx.State:
        """Return the sharding of each parameter; `first` is that of one of the trainer's."""
        if self._mesh is None:
            return jax.tree.map(lambda _: first, self._params)
        return sharding.param_shardings(self._params, self._mesh)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Set the engine's mesh, which tells the programs' platform."""
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            yield

    def _unstacked(self, params: nnx.State) -> Policy:
        """Return the policy with the trainer's parameters in the engine's dtype, and with separate
        layers."""
        # Copied even if nothing changes, since the trainer donates its arrays.
        params = jax.tree.map(lambda x: jnp.array(x, self.dtype, copy=True), params)
        model = nnx.merge(self._trainer_graph, params)
        model.unstack(vision=not self._on_cpu)
        return model

    def _empty(self) -> tuple[cache.Cache, jax.Array]:
        config, model = self.config, self._model_config
        empty = cache.allocate(
            model.text, self.dtype, self.num_lanes, self.num_pages, config.page_size
        )
        store = jnp.zeros((config.image_cache_tokens, model.vision.token_width), self.dtype)
        return empty, store

    def _define(self) -> None:
        def encode(model, store, images, slots):
            tokens = model.encode_images(images)
            flat = tokens.reshape(-1, tokens.shape[-1])
            store = store.at[slots.reshape(-1)].set(flat.astype(store.dtype), mode="drop")
            # The store is donated to the next call. The number shows when this one has ended.
            return store, flat[0, 0]

        # Without, as compiling takes more than twice as long, for each number of windows.
        self.encode = self._with_params(encode, large_products=False)
        self.extend = self._with_params(cache.extend)
        self.decode = self._with_params(decode.decode, static=("steps", "running"))
        self.fork = jax.jit(self._on_engines(cache.fork), donate_argnums=0)
        self.read_pages = jax.jit(self._on_engines(cache.read_pages))
        self.write_pages = jax.jit(self._on_engines(cache.write_pages), donate_argnums=0)
        self.empty = jax.jit(self._empty, out_shardings=(self._cache_layout, self.replicated))
        self._load_programs: dict[Mesh | None, Callable[[nnx.State], nnx.State]] = {}

    def _with_params(
        self,
        function: Callable[..., Any],
        *,
        static: Sequence[str] = (),
        large_products: bool = True,
    ) -> Any:
        """Return a jitted function of parameters, a donated state and further arguments.

        Args:
          function: Function of the policy, the state and the arguments.
          static: Names of static arguments.
          large_products: Whether to compile for large matrix products.
        """
        graph, precision = self._graph, "highest" if self.dtype == jnp.float32 else None

        @functools.wraps(function)
        def run(params, *args, **keywords):
            with jax.default_matmul_precision(precision):  # accelerators reduce it by default
                return function(nnx.merge(graph, params), *args, **keywords)

        options = sharding.compiler_options(vmem_mib=64) if large_products else None
        return jax.jit(
            self._on_engines(run, SHARED[function.__name__]),
            donate_argnums=1, static_argnames=static, compiler_options=options,
        )  # fmt: skip

    def _on_engines(
        self, function: Callable[..., Any], shared: Sequence[int] = ()
    ) -> Callable[..., Any]:
        """Return a function that runs on the devices of all engines of these programs.

        Args:
          function: Function of arrays of one engine.
          shared: Positions of arguments that are the same for all engines.
        """
        return function  # there is one engine

    def load(self, mesh: Mesh | None) -> Callable[[nnx.State], nnx.State]:
        """Return the program that converts the trainer's parameters to the engine's.

        Args:
          mesh: Mesh of the trainer, on which each tensor group gets a copy; None: the parameters
            are on the engine's own devices.
        """
        if mesh not in self._load_programs:
            layout = self.layout
            if mesh is not None:
                layout = placement.engine_layout_on(mesh, layout)
            self._load_programs[mesh] = jax.jit(
                lambda params: nnx.split(self._unstacked(params))[1], out_shardings=layout
            )
        return self._load_programs[mesh]

    def put_pages(self, layers: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
        """Return the contents of some pages, one array a layer, on the engine's devices."""
        return jax.device_put(layers, self._cache_layout.pages)

    @property
    def decode_settings(self) -> dict[str, int]:
        """Static arguments of `decode`."""
        return dict(steps=self.config.decode_steps, running=self._running)

    def encode_name(self, images: ImageRows) -> str:
        """Return the name of the program that encodes images of this shape."""
        P = images.segment_ids.shape[-1]
        return f"encode {P // self._model_config.vision.window_patches} windows"

    def extend_name(self, new: cache.PrefillBatch) -> str:
        """Return the name of the program that writes tokens of this shape."""
        return f"extend {new.tokens.shape[-1]} tokens"

    def encode_rows(self, windows: int) -> int:
        """Return the number of rows of the program that encodes images of up to `windows`."""
        return max(1, self.config.encode_windows // windows)

    def extend_rows(self, length: int) -> int:
        """Return the number of rows of the program that extends lanes by `length` tokens."""
        return max(1, self.config.prefill_tokens // length)

    # Compiling without running

    def calls(self) -> Iterator[Call]:
        """Yield all programs with abstract arguments of each of their shapes."""
        params, (lanes, store) = self.abstract_params(), self.abstract_state()
        yield Call("load", self.load(None), (self._trainer_params,))
        for windows in self._windows:
            images, slots = self._abstract_images(self.encode_rows(windows), windows)
            args = (params, store, images, slots)
            yield Call(self.encode_name(images), self.encode, args)
        for length in self.config.prefill_buckets:
            new = self._abstract_chunks(self.extend_rows(length), length)
            yield Call(self.extend_name(new), self.extend, (params, lanes, new, store))
        yield Call("decode", self.decode, *self._abstract_decode(params, lanes))
        index = self._abstract((), np.int32)
        yield Call("fork", self.fork, (lanes, index, index, index, index))
        moved = self._abstract((PAGES_PER_MOVE,), np.int32)
        yield Call("read_pages", self.read_pages, (lanes, moved))
        contents = tuple(
            self._abstract((PAGES_PER_MOVE, *layer.shape[1:]), layer.dtype) for layer in lanes.pages
        )
        yield Call("write_pages", self.write_pages, (lanes, moved, contents))

    def abstract_params(self) -> nnx.State:
        """Return the shapes and shardings of the engine's parameters."""
        return sharding.with_shardings(self._params, self.layout)

    def abstract_state(self) -> tuple[cache.Cache, jax.ShapeDtypeStruct]:
        """Return the shapes and shardings of the cache and of the store of image tokens."""
        with self.context():
            lanes, store = jax.eval_shape(self._empty)
        lanes = sharding.with_shardings(lanes, self._cache_layout)
        return lanes, self._abstract(store.shape, store.dtype)

    def _abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

    def _abstract_tables(self, V: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Return the transition table and the allowed tokens of a vocabulary of V tokens."""
        arrays = [((self._states, V), np.int16), ((V,), bool)]
        next_state, allowed = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated) for shape, dtype in arrays
        )
        return next_state, allowed

    def _abstract_images(self, rows: int, windows: int) -> tuple[Any, Any]:
        vision, array = self._model_config.vision, self._abstract
        images = jax.tree.map(
            lambda x: array(x.shape, x.dtype), abstract_images(rows, windows, vision)
        )
        merged = windows * vision.window_patches // vision.merge_size**2
        return images, array((rows, merged), np.int32)

    def _abstract_chunks(self, B: int, T: int) -> Any:
        array: Any = self._abstract
        rows = PagedRows(
            table=array((B, self.pages_per_lane), np.int32),
            start=array((B,), np.int32),
            count=array((B,), np.int32),
        )
        return cache.PrefillBatch(
            lane=array((B,), np.int32),
            rows=rows,
            tokens=array((B, T), np.int32),
            positions=array((B, 3, T), np.int32),
            image_index=array((B, T), np.int32),
        )

    def _abstract_decode(self, params: Any, lanes: Any) -> tuple[tuple, dict[str, Any]]:
        array: Any = self._abstract
        B, V = self.config.decode_batch_size, self._model_config.text.vocab_size
        names = {f.name for f in dataclasses.fields(decode.Rows)} - {"table", "active", "sampling"}
        rows = decode.Rows(
            table=array((B, self.pages_per_lane), np.int32),
            active=array((B,), bool),
            sampling=jax.tree.map(lambda x: array(x.shape, x.dtype), Sampling.uniform(B)),
            **{name: array((B,), np.int32) for name in names},
        )
        scalar, tables = array((), np.int32), self._abstract_tables(V)
        args = (params, lanes, rows, *tables, scalar, scalar)
        return args, self.decode_settings
