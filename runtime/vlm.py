"""The model as a program uses it: messages in, text out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.answer import Answer
from moiie_runtime.backends import backend_names, get_backend
from moiie_runtime.backends.session import PORTABLE_OPTIONS, EngineOptions, Session
from moiie_runtime.beam_generate import generate_beams, stream_beams
from moiie_runtime.bundle import Bundle
from moiie_runtime.chat import Message
from moiie_runtime.decoder import Decoder
from moiie_runtime.device_memory import DeviceEstimate, estimate_device, free_memory
from moiie_runtime.engines import DEFAULT_TARGET, PORTABLE, built_targets, open_engine, refuse_gpu
from moiie_runtime.errors import MoiieError
from moiie_runtime.feature_cache import FeatureCache
from moiie_runtime.generate import TEXT_ONLY, Chunk, Generation, Record, generate, stream
from moiie_runtime.generation_config import SETTINGS, GenerationConfig
from moiie_runtime.images import ImageSource
from moiie_runtime.kv_cache import KVCache
from moiie_runtime.memory import MemoryEstimate, Request, check_memory, estimate_memory
from moiie_runtime.processor import Processor
from moiie_runtime.prompt import Prompt, penalty_ids
from moiie_runtime.sessions import Sessions
from moiie_runtime.sizes import parse_size
from moiie_runtime.vision import Vision

FEATURE_CACHE = 64 * 2**20


def load(  # noqa: PLR0913 - settings, each given by its name
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    threads: int | None = None,
    memory_limit: int | str | None = None,
    feature_cache: int | str = FEATURE_CACHE,
    skip_below: float | None = None,
    gpu: int | None = None,
) -> VLM:
    """Open a bundle for asking.

    Args:
        path: the bundle's directory.
        target: a form that `moiie build` made of the bundle; "portable" for the bundle's own graphs; or the name of a
            backend that shall run these (see `moiie_runtime.backends`). None: the form "cpu" where the bundle was built
            for it, else its own graphs.
        threads: threads for the arithmetic; None for one for each physical core that the process may use.
        memory_limit: bytes, or a text such as "8GiB"; requests predicted to need more are refused. It counts on the GPU
            where the bundle runs on one; without it, what is free there is the limit.
        feature_cache: bytes, or a text such as "1GiB", for features of pictures: another question on one of them runs
            no vision encoder. 0 keeps none.
        skip_below: leave out vision experts that are expected to add less than this share; see `Vision`. An
            approximation, off by default.
        gpu: which GPU runs a form that was built for one, as `moiie doctor` numbers them; None: the first.

    Raises:
        MoiieError: no bundle, a damaged one, a form it was not built in, or a bad argument.
        MissingDependency: the backend's packages are not installed, or the limit is too low for this bundle.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise MoiieError(f"threads must be an integer of at least 1, got {threads!r}")
    limit = None if memory_limit is None else parse_size(memory_limit)
    keeps_none = feature_cache in (0, "0") and not isinstance(feature_cache, bool)
    budget = 0 if keeps_none else parse_size(feature_cache)
    bundle, open_session, options = _opened(Bundle.open(path), target, threads, gpu)
    try:
        return VLM(bundle, open_session, limit, feature_cache=budget, skip_below=skip_below, options=options)
    except BaseException:
        options.close()
        raise


def _opened(
    bundle: Bundle, target: str | None, threads: int | None, gpu: int | None
) -> tuple[Bundle, Callable[[str], Session], EngineOptions]:
    """The form of a bundle that will run, what opens its graphs, and the options of these."""
    wanted = target or (DEFAULT_TARGET if DEFAULT_TARGET in built_targets(bundle) else PORTABLE)
    options = PORTABLE_OPTIONS
    if wanted == PORTABLE or wanted in backend_names():
        backend = "onnxruntime" if wanted == PORTABLE else wanted
        refuse_gpu(wanted, gpu)
    else:
        engine = open_engine(bundle, wanted, gpu)
        bundle, backend, threads = engine.bundle, engine.backend, threads or engine.threads
        options = engine.options()
    opener = get_backend(backend)

    def open_session(component: str) -> Session:
        path = bundle.path(bundle.components[component].file)
        # Prefill and the vision encoder run once a request: what they work with must not stay while tokens are made.
        transient = component != "decoder_decode"
        return opener(path, component=component, threads=threads, transient=transient, options=options)

    return bundle, open_session, options


class VLM:
    """A vision-language model. Make one with `moiie_runtime.load`.

    Nothing large is read before the first question; a vision encoder is loaded with the first picture. Wherever a
    method takes `**generation`, these are fields of `GenerationConfig`; what is not given comes from the bundle.

    Where an instance router chooses experts by the instruction, the authors trained and tested with one picture and one
    question. Questions without a picture (adapters alone), several pictures and several turns work too, untested by them.

    Args:
        bundle: an opened bundle.
        open_session: opens the session of a component.
        memory_limit: bytes that the process may be predicted to use; None for no limit.
        feature_cache: bytes of features of pictures to keep.
        skip_below: see `load`.
        options: of the sessions; closed with the model.

    Attributes:
        bundle: what was loaded.
        processor: turns messages into prompts.
        feature_cache: features of pictures, with counts of hits and misses.

    Raises:
        MoiieError: damaged files, or a model that cannot run within the limit.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_session: Callable[[str], Session],
        memory_limit: int | None = None,
        *,
        feature_cache: int = FEATURE_CACHE,
        skip_below: float | None = None,
        options: EngineOptions = PORTABLE_OPTIONS,
    ) -> None:
        self._options = options
        self._limit, self._limit_of = memory_limit, "the limit"
        if memory_limit is None and options.device is not None:
            self._limit, self._limit_of = free_memory(options.device), f"the free memory of {options.device.name}"
        bundle.check_files()
        self.bundle = bundle
        self._check_memory(Request())
        self.processor = Processor(bundle)
        self._defaults = _default_config(bundle)
        self.feature_cache = FeatureCache(feature_cache)
        sessions = Sessions(bundle, open_session, options)
        self._decoder = Decoder(bundle, sessions, Vision(bundle, sessions, self.feature_cache, skip_below))

    def stream(self, messages: Sequence[Message], *, reroute: bool = False, **generation: Any) -> Iterator[Chunk]:
        """The answer to a conversation, piece by piece.

        Args:
            messages: see `ChatTemplate.render`; content holds text and pictures.
            reroute: see `Processor`.
            generation: settings.

        Returns:
            An iterator of chunks, one a token; with beams a single one, because no token is certain before the search
            is over. Wrong arguments raise here, before it is asked for the first.

        Raises:
            MoiieError: a conversation, picture or setting that cannot be used, a prompt that does not fit the
                context, or a request beyond the memory limit.
        """
        return self._stream(self.processor(messages, reroute=reroute), generation)

    def stream_prompt(
        self,
        prompt: str | Prompt,
        images: Sequence[ImageSource] = (),
        *,
        instruction: str | None = None,
        **generation: Any,
    ) -> Iterator[Chunk]:
        """The answer to a complete prompt, piece by piece; see `generate_prompt` and `stream`."""
        return self._stream(self._prepared(prompt, images, instruction), generation)

    def generate(
        self, messages: Sequence[Message], *, record: Record = TEXT_ONLY, reroute: bool = False, **generation: Any
    ) -> Generation:
        """The whole answer to a conversation.

        Args:
            messages: see `ChatTemplate.render`; content holds text and pictures.
            record: logits and routing to keep.
            reroute: see `Processor`.
            generation: settings.

        Raises:
            MoiieError: as in `stream`; routing asked of a dense model, or logits or routing of steps with beams.
        """
        return self.generate_batch([messages], record=record, reroute=reroute, **generation)[0]

    def generate_prompt(
        self,
        prompt: str | Prompt,
        images: Sequence[ImageSource] = (),
        *,
        instruction: str | None = None,
        record: Record = TEXT_ONLY,
        **generation: Any,
    ) -> Generation:
        """The whole answer to a complete prompt, which no template is applied to.

        Args:
            prompt: text with one image marker for each picture, or what `processor` made of text and pictures.
            images: the pictures of a text, in the order of the markers.
            instruction: the raw question beside a text, for bundles with an instance router.
            record: logits and routing to keep.
            generation: settings.

        Raises:
            MoiieError: as in `generate`.
        """
        return self._generate([self._prepared(prompt, images, instruction)], record, generation)[0]

    def generate_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        record: Record = TEXT_ONLY,
        reroute: bool = False,
        **generation: Any,
    ) -> list[Generation]:
        """Answers to several conversations, run together; each is what it would be alone.

        Args:
            conversations: with and without pictures, of any lengths.
            record: logits and routing to keep.
            reroute: see `Processor`.
            generation: settings, the same for all.

        Raises:
            MoiieError: as in `generate`, or no conversation at all.
        """
        if not conversations:
            raise MoiieError("there is no conversation to answer", "give at least one list of messages")
        prompts = [self.processor(messages, reroute=reroute) for messages in conversations]
        return self._generate(prompts, record, generation)

    def image_features(self, prompt: Prompt) -> NDArray[np.float32]:
        """What stands for the pictures of a prepared prompt in its decoder input: [images, image_tokens, hidden].

        Several encoders are weighted as the prompt's instruction says.

        Raises:
            MoiieError: a graph that cannot be loaded or run.
        """
        return self._decoder.image_features(prompt)

    def settings(self, **generation: Any) -> GenerationConfig:
        """What a request with these settings would use: the bundle's for those that are not given.

        Raises:
            MoiieError: a setting that cannot be used.
        """
        return self._defaults.updated(generation)

    def predicted_memory(self, request: Request) -> MemoryEstimate | DeviceEstimate:
        """What a request of this size is predicted to take at its peak: on the GPU where the model runs on one."""
        if self._options.engine is not None and self._options.device is not None:
            return estimate_device(self._options.engine, request)
        return estimate_memory(self.bundle, request)

    def close(self) -> None:
        """Release all graphs, weights and buffers. Closing twice is allowed."""
        self._decoder.close()
        self._options.close()

    def __enter__(self) -> VLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepared(self, prompt: str | Prompt, images: Sequence[ImageSource], instruction: str | None) -> Prompt:
        if isinstance(prompt, str):
            return self.processor.from_text(prompt, images, instruction)
        for given, what in ((images, "pictures"), (instruction, "instruction")):
            if given:
                raise MoiieError(f"a prepared prompt holds its {what} already", f"give {what} with a text only")
        return prompt

    def _stream(self, prompt: Prompt, generation: Mapping[str, Any]) -> Iterator[Chunk]:
        [answer] = self._answers([prompt], generation, TEXT_ONLY)
        run = stream if answer.config.num_beams == 1 else stream_beams
        return run(self._decoder, answer, self._cache([answer]))

    def _generate(self, prompts: Sequence[Prompt], record: Record, generation: Mapping[str, Any]) -> list[Generation]:
        answers = self._answers(prompts, generation, record)
        run = generate if answers[0].config.num_beams == 1 else generate_beams
        return run(self._decoder, answers, self._cache(answers), record)

    def _check_memory(self, request: Request) -> None:
        check_memory(self.predicted_memory(request), self._limit, self.bundle, what=self._limit_of)

    def _cache(self, answers: Sequence[Answer]) -> KVCache:
        return KVCache(self.bundle, len(answers), answers[0].config.num_beams, self._options.device)

    def _answers(self, prompts: Sequence[Prompt], generation: Mapping[str, Any], record: Record) -> list[Answer]:
        """Everything that can be refused is refused here, before a graph is loaded or run."""
        if record.routing and self.bundle.model.moe is None:
            raise MoiieError(f"{self.bundle.name}: a dense model has no experts, so there is no routing to record")
        config = self.settings(**generation)
        _check_record(record, config)
        explicit = generation.get("max_new_tokens") is not None
        configs = [_fitted(config, prompt, self.bundle.kv_cache.capacity, explicit) for prompt in prompts]
        pictures = [picture for prompt in prompts for picture in prompt.pictures]
        request = Request(
            batch=len(prompts),
            prompt_tokens=max(prompt.length for prompt in prompts),
            new_tokens=max(config.max_new_tokens for config in configs),
            images=len(pictures),
            picture_bytes=sum(picture.nbytes for picture in pictures),
            feature_bytes=self.feature_cache.nbytes,
            all_logits=record.prefill_logits == "all",
            num_beams=config.num_beams,
        )
        self._check_memory(request)
        stop_string, rule = self.bundle.prompt.stop_string, self.bundle.penalty_prompt
        return [
            Answer(prompt, config, self.processor.tokenizer, stop_string, penalty_ids(prompt, rule, self.bundle.tokens))
            for prompt, config in zip(prompts, configs, strict=True)
        ]


def _default_config(bundle: Bundle) -> GenerationConfig:
    given = {name: bundle.generation[name] for name in SETTINGS if bundle.generation.get(name) is not None}
    try:
        return GenerationConfig(**given, eos_token_id=bundle.tokens.eos)
    except MoiieError as error:
        raise MoiieError(
            f"{bundle.root}/bundle.json: generation: {error.message}", "export the bundle again"
        ) from error


def _check_record(record: Record, config: GenerationConfig) -> None:
    """With beams a step has several rows, and which of them led to the answer is known only in the end."""
    for name in ("step_logits", "routing"):
        if getattr(record, name) and config.num_beams > 1:
            raise MoiieError(
                f"{name} cannot be recorded with num_beams={config.num_beams}", "ask for it with num_beams=1"
            )


def _fitted(config: GenerationConfig, prompt: Prompt, capacity: int, explicit: bool) -> GenerationConfig:
    """The settings for one prompt: a default `max_new_tokens` gives way to the context limit, a wish does not."""
    hint = "use a shorter prompt or fewer pictures, or export the bundle with a larger max_context"
    room = capacity - prompt.length
    if room < 1:
        raise MoiieError(
            f"the prompt has {prompt.length} tokens ({prompt.image_tokens} of them for pictures), "
            f"but the context holds {capacity} with the answer",
            hint,
        )
    if config.max_new_tokens <= room:
        return config
    if explicit:
        raise MoiieError(
            f"the prompt has {prompt.length} tokens and max_new_tokens is {config.max_new_tokens}, "
            f"together more than the context of {capacity}",
            f"ask for at most {room} new tokens; or {hint}",
        )
    return replace(config, max_new_tokens=room)
