"""Mutants of runs that go on and of models that serve, for `mutants.py`: (name, file, old, new, tests)."""

from __future__ import annotations

LOOP, RUNFILE = "cllava_fast/train/loop.py", "cllava_fast/train/runfile.py"
BRANCH, PROCESSES = "cllava_fast/methods/branch_lora.py", "tests/test_distributed.py"
INSTRUCTIONS = "cllava_fast/model/instructions.py"
CHECKPOINT, LATER, SHARING = "tests/test_checkpoint.py", "tests/test_later_tasks.py", "tests/test_sharing.py"

SERVING_MUTANTS = [
    (
        "beams ask at each step", "cllava_fast/methods/base.py", "if asked not in self._expanded:", "if True:",
        "tests/test_decoding.py",
    ),
    (
        "what a graph records is kept", "cllava_fast/methods/base.py", "if checks.captured():", "if False:",
        "tests/test_decoding.py",
    ),
    (
        "without a query a loop of one's own has its generate's rows", "cllava_fast/model/selecting.py",
        " and not increments.call.custom:", ":", "tests/test_decoding.py",
    ),
    (
        "what was expanded in inference mode trains", "cllava_fast/methods/base.py",
        "asked = batch, torch.is_inference_mode_enabled()", "asked = batch, False", "tests/test_decoding.py",
    ),
    (
        "without a query a layer asks at each step", "cllava_fast/model/selecting.py",
        "if pending is not None and not increments.method.routes and not increments.call.custom:", "if False:",
        "tests/test_decoding.py",
    ),
    (
        "task 100 is older than task 11", "cllava_fast/model/files.py", "[folder for _, folder in sorted(numbered)]",
        "sorted(folder for _, folder in numbered)", CHECKPOINT,
    ),
    (
        "a task that could not be saved stays learned", LOOP,
        "self.increments.pool.load_state(self._state_before, self._before)", "pass", CHECKPOINT,
    ),
    (
        "a run goes on whatever the model had learned", LOOP, '"learned_before": learned_before(self.increments.pool),',
        "", LATER,
    ),
    ("tasks are counted from the run's first", LOOP, "[[]] * len(self._before) + ", "", LATER),
    ("a run goes on with other tasks", RUNFILE, "if before != now:", "if False:", LATER),
    ("other samples of what was learned", RUNFILE, "for i, (train, other)", "for i, (_, other)", LATER),
    ("other samples of what was measured", RUNFILE, "other if i < measured", "None if i < measured", LATER),
    ("what is half learned may change", RUNFILE, ' + half', "", LATER),
    ("run.json stays of the old tasks", LOOP, "        for _ in range(2):  #", "        for _ in range(0):  #", LATER),
    ("the one before run.json stays of the old tasks", LOOP, "for _ in range(2):  #", "for _ in range(1):  #", LATER),
    ("increments of a task that was replaced stay", LOOP, "if other.name not in names:", "if False:", LATER),
    ("what is the end now was measured in part", LOOP, "if self._ends_within_budget():", "if False:", LATER),
    ("any checkpoint is of half a task", RUNFILE, 'int(name.partition("-")[0]) > done', "True", LATER),
    (
        "any broken pipe is the reader's", "cllava_fast/cli/__init__.py", " and _reader_is_gone()", "",
        "tests/test_cli.py",
    ),
    ("what is still to come may not change", RUNFILE, "enumerate(of_tasks)][:learned]", "enumerate(of_tasks)]", LATER),
    (
        "joint training goes on with more tasks", RUNFILE,
        'if not METHODS[identity["method"]["method"]][1].joint:', "if True:", LATER,
    ),
    (
        "evaluation samples as the base would", "cllava_fast/evaluate/predict.py",
        "model.generation_config = GenerationConfig(**{name: getattr(whole, name, None) for name in kept})", "pass",
        "tests/test_evaluation.py",
    ),
    (
        "evaluation runs on behind an answer", "cllava_fast/evaluate/predict.py",
        "[*_ends(model), tokenizer.eos_token_id]", "_ends(model)", "tests/test_evaluation.py",
    ),
    (
        "an encoder that was trained again is not read", "cllava_fast/surrogate.py",
        "tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)",
        "tuple((path, 0, 0) for path in files)", "tests/test_instructions.py",
    ),
    (
        "a typed mark of the image is read back", "cllava_fast/model/instructions.py",
        "self._image, self._image_read)", "self._image)", "tests/test_hostile_data.py",
    ),
    (
        "a task is named as its folder", "cllava_fast/cli/running.py", "for names in (tasks, folders):",
        "for names in (folders, tasks):", CHECKPOINT,
    ),
    ("a task's folder has a name too long", LOOP, "[:MAX_NAME_BYTES]", "", CHECKPOINT),
    (
        "a number of results.json is a line", "cllava_fast/atomic.py",
        "and value and isinstance(value[0], dict | list | tuple)", "and value", "tests/test_report.py",
    ),
    (
        "an answer of two models", "cllava_fast/model/calls.py",
        "        remember(output)\n    _check_not_swapped(increments, swaps)\n", "        remember(output)\n", SHARING,
    ),
    (
        "a call that broke on what was loaded says how", "cllava_fast/model/calls.py",
        "        _check_not_swapped(increments, swaps, error)\n", "", SHARING,
    ),
    ("loading is nothing to tell", "cllava_fast/model/files.py", "with increments.swapping():", "if True:", SHARING),
    (
        "merging is nothing to tell", "cllava_fast/model/merging.py",
        "torch.no_grad(), increments.swapping():", "torch.no_grad():", SHARING,
    ),
    (
        "taking out is nothing to tell", "cllava_fast/model/merging.py",
        "    with increments.swapping():\n        for path in increments.pristine:",
        "    if True:\n        for path in increments.pristine:", SHARING,
    ),
    (
        "scaling is nothing to tell", "cllava_fast/model/layer_scaling.py",
        "with increments.swapping():", "if True:", SHARING,
    ),
    (
        "a cache outlives the rows before a scaling", "cllava_fast/model/layer_scaling.py",
        "        increments.pool.loads += 1\n", "", "tests/test_caches.py",
    ),
    (
        "unpatching is nothing to tell", "cllava_fast/model/patching.py",
        "    increments.swaps += 2\n", "", SHARING,
    ),
    (
        "two models are one parameter", "cllava_fast/model/sharing.py",
        "if isinstance(tensor, nn.Parameter) else tensor", "if False else tensor", SHARING,
    ),
    (
        "two models have one pool", "cllava_fast/model/sharing.py",
        'if name.startswith("increments."):', "if False:", SHARING,
    ),
    (
        "weights under a merge are copied", "cllava_fast/model/sharing.py",
        "        shared.update({id(weight): weight for weight in model.increments.pristine.values()})\n",
        "        pass\n", SHARING,
    ),
    (
        "another library's adapters are saved over", "cllava_fast/model/files.py",
        "    check_nothing_over(model)\n    if increments", "    if increments", SHARING,
    ),
    (
        "a copy asks what lay under the original", "cllava_fast/model/patching.py",
        'call = self.__dict__["_under"][name] if is_over', 'call = module.__dict__["_under"][name] if is_over', SHARING,
    ),
    (
        "accelerate puts another in the place of ours", "cllava_fast/model/patching.py",
        'model.__dict__.pop("_original_forward", None)\n    record', 'None\n    record', SHARING,
    ),
    (
        "an answer within a swap counts", "cllava_fast/model/calls.py",
        "increments.swaps != swaps or swaps % 2", "increments.swaps != swaps", SHARING,
    ),
    (
        "a cache stands for what was replaced", "cllava_fast/model/calls.py",
        "        if increments.swaps == swaps:\n            remember(output)", "        remember(output)", SHARING,
    ),
    (
        "threads share a call", "cllava_fast/model/increments.py", "class Call(threading.local):", "class Call:",
        "tests/test_calls.py",
    ),
    (
        "a loss of one's own is the frozen base's", "cllava_fast/model/patching.py",
        '    yield model.model, "forward", calls.backbone_forward\n', "", "tests/test_calls.py",
    ),
    (
        "a part of the model answers as the frozen base", "cllava_fast/model/calls.py",
        "if not handed and increments.may_act:", "if False:", "tests/test_calls.py",
    ),
    (
        "a merged model's parts are refused", "cllava_fast/model/increments.py",
        "return not self.pristine and (self.pool", "return (self.pool", "tests/test_calls.py",
    ),
    (
        "a Qwen is not told where images are", "cllava_fast/data/encode.py",
        "if self.encoder.tells_images:", "if False:", "tests/test_bases.py",
    ),
    (
        "all images of a Qwen's batch are one", "cllava_fast/model/images.py",
        "image.mean(0) for image in", "hidden.mean(0) for image in", "tests/test_bases.py",
    ),
    (
        "what stands around an image is asked", "cllava_fast/model/increments.py",
        '"video", "vision_start", "vision_end")', '"video")', "tests/test_bases.py",
    ),
    (
        "a hook that calls the model ends its layer's rows", "cllava_fast/model/calls.py",
        "call.given, call.active, call.queries = outer", "call.given, call.active, call.queries = None, None, None",
        "tests/test_calls.py",
    ),
    (
        "a linear that was replaced answers as the frozen base", "cllava_fast/model/calls.py",
        "        _check_in_place(model)\n", "        pass\n", "tests/test_patch.py",
    ),
    (
        "queries of other shapes are read", "cllava_fast/model/increments.py",
        "if queries.shape[:2] != x.shape[:2] or queries.shape[2:].numel() != x.shape[2]:", "if False:",
        "tests/test_backbones.py",
    ),
    (
        "a Qwen's step is a mean of means", "cllava_fast/train/tune.py",
        'self.model_accepts_loss_kwargs |= kwargs["model"].loss_function is ForCausalLMLoss', "pass",
        "tests/test_bases.py",
    ),
    (
        "kernels of other sources are used", "cllava_fast/ops/native.py",
        '_says(name, "cllava_schemas", ctypes.c_uint) != _says("_native_cpu.so", "cllava_schemas", ctypes.c_uint)',
        "False", "tests/test_native.py",
    ),
    (
        "kernels of another schemas.h than the source tree's are used", "cllava_fast/ops/native.py",
        "built_with != zlib.crc32(", "False and zlib.crc32(", "tests/test_native.py",
    ),
    (
        "kernels that this GPU cannot run are used", "cllava_fast/ops/native.py",
        "return why and f", "return None and f", "tests/test_native.py",
    ),
    (
        "Triton where it cannot launch is used", "cllava_fast/ops/triton_backend.py",
        "dispatch.too_old() or _cannot_launch()", "dispatch.too_old()", "tests/test_backends.py",
    ),
    (
        "layers that hand nothing on have no increments", "cllava_fast/model/calls.py",
        "if not handed and call.given:", "if False:", "tests/test_backbones.py",
    ),
    (
        "the caller's tokenizer reads instructions", INSTRUCTIONS,
        'copy.deepcopy(getattr(processor, "tokenizer", processor))', 'getattr(processor, "tokenizer", processor)',
        "tests/test_instructions.py",
    ),
    (
        "a tokenizer decodes in several threads", INSTRUCTIONS, "with _reading:\n                    text",
        "if True:\n                    text", "tests/test_instructions.py",
    ),
    (
        "a patched model is pickled as the base", "cllava_fast/model/calls.py", "def __reduce__(self) -> Any:",
        "def reduce(self) -> Any:", "tests/test_patch.py",
    ),
    (
        "generate within generate ends the outer one's", "cllava_fast/model/calls.py",
        "call.pending, call.custom = outer, custom", "call.pending, call.custom = None, custom", "tests/test_bases.py",
    ),
    (
        "a question within generate has the outer one's rows", "cllava_fast/model/calls.py",
        "pending = within if increments.call.custom else None", "pending = within", "tests/test_calls.py",
    ),
    (
        "a question within generate has the outer one's rows where it has a turn", "cllava_fast/model/selecting.py",
        "within is not None and not _asks(increments, request)", "within is not None", "tests/test_calls.py",
    ),
    (
        "how far is far depends on the width", "cllava_fast/methods/calibration.py", "noise = NOISE / width",
        "noise = 1e-3", "tests/test_calibration.py",
    ),
    (
        "answers that cannot be met are not told of", "cllava_fast/data/lengths.py", "length - 1 > most for",
        "False for", "tests/test_data.py",
    ),
    (
        "a question waits for another thread's data set", "cllava_fast/surrogate.py",
        "        self._model[0].register_forward_pre_hook(self._turns.hand_on)\n", "", "tests/test_instructions.py",
    ),
    (
        "texts are kept without end", "cllava_fast/texts.py", "self._bytes > CACHE_BYTES", "False",
        "tests/test_instructions.py",
    ),
    (
        "packed samples are taken for one", "cllava_fast/model/selecting.py", "    if packed:\n", "    if False:\n",
        "tests/test_learning.py",
    ),
    (
        "increments wait for the garbage collector", "cllava_fast/model/increments.py",
        "functools.partial(_own_tensors, self.method, key_dim if self.remembers_queries else None)",
        "lambda *sizes: _own_tensors(self.method, key_dim if self.remembers_queries else None, *sizes)", SHARING,
    ),
    (
        "texts of a data set are padded to the longest", "cllava_fast/surrogate.py",
        "[texts] if batch_size == 1 else", "[texts] if True else", "tests/test_instructions.py",
    ),
    (
        "an instruction that is cut off is not told of", "cllava_fast/surrogate.py", "len(one) > most for", "False for",
        "tests/test_instructions.py",
    ),
    (
        "a step waits for its static cache", "cllava_fast/model/selecting.py",
        "if not (step and selection is not None) and not", "if not", "tests/test_decoding.py",
    ),
    (
        "a cache that was emptied otherwise keeps its rows", "cllava_fast/model/selecting.py",
        'ids is None and getattr(cache, "is_compileable", False)', "ids is None", "tests/test_cache_moves.py",
    ),
    (
        "a cache that was emptied keeps its rows", "cllava_fast/model/caches.py",
        "self.name in MOVES and self", "self.name == RESET or self", "tests/test_cache_moves.py",
    ),
    (
        "samples that are moved layer by layer move alone", "cllava_fast/model/caches.py", "_layers(cache)[:1]):",
        "[]):", "tests/test_cache_moves.py",
    ),
    (
        "a copy of a layer moves what it is a copy of", "cllava_fast/model/caches.py",
        '__getstate__" not in', '__getstate__" in', "tests/test_cache_moves.py",
    ),
    (
        "requests join a cache unnoticed", "cllava_fast/model/caches.py", "rows != self.rows", "False",
        "tests/test_cache_moves.py",
    ),
    (
        "a move makes an edited cache known", "cllava_fast/model/caches.py", "if edited or not", "if not",
        "tests/test_cache_moves.py",
    ),
    (
        "a turn that was taken back acts", "cllava_fast/model/caches.py", "turn in found.turns if turn.begin < length",
        "turn in found.turns", "tests/test_cache_moves.py",
    ),
    (
        "half a prompt acts", "cllava_fast/model/caches.py", "length < last.end - 1", "False",
        "tests/test_cache_moves.py",
    ),
    (
        "the last token of a prompt cannot be read again", "cllava_fast/model/caches.py", "last.end - 1", "last.end",
        "tests/test_cache_moves.py",
    ),
    (
        "an image that was taken back counts", "cllava_fast/model/caches.py",
        "last.selection = replace(last.selection, images=None)", "pass", "tests/test_cache_moves.py",
    ),
    (
        "what was said is taken for what was read", "cllava_fast/model/calls.py",
        "if instructions is None and query is None else None", "", "tests/test_cache_moves.py",
    ),
    (
        "what goes on is a new turn", "cllava_fast/model/caches.py", " or selection is found.going_on", "",
        "tests/test_cache_moves.py",
    ),
    (
        "half a question is a question", "cllava_fast/model/selecting.py", "if half is not None:", "if False:",
        "tests/test_caches.py",
    ),
    (
        "a cache that was edited is what it was", "cllava_fast/model/caches.py", "turn.open = False",
        "pass", "tests/test_cache_moves.py",
    ),
    (
        "what asks nothing within generate has no rows", "cllava_fast/model/selecting.py",
        "within is not None and not _asks(increments, request)", "False", "tests/test_bases.py",
    ),
    (
        "the end of an answer begins a turn", INSTRUCTIONS, ".removeprefix(behind_answer)", "",
        "tests/test_instructions.py",
    ),
    (
        "what a model is made to think ends a turn", INSTRUCTIONS,
        "(asked, behind or asking)", "(behind or asking, behind or asking)", "tests/test_instructions.py",
    ),
    (
        "what follows a turn's end ends it, too", INSTRUCTIONS, "end = end[:1]", "pass", "tests/test_instructions.py",
    ),
    (
        "a marker begins within a token", INSTRUCTIONS, "_parts(tokenizer, before)[::-1]", "[*before][::-1]",
        "tests/test_instructions.py",
    ),
    (
        "a system prompt is a part of the instruction", INSTRUCTIONS, "if self._behind_system:", "if False:",
        "tests/test_instructions.py",
    ),
    (
        "a generate within generate has the outer one's rows", "cllava_fast/model/calls.py",
        "pending=outer if assists or custom", "pending=outer if True", "tests/test_calls.py",
    ),
    (
        "a loop of one's own loses the instructions", "cllava_fast/model/calls.py",
        'kwargs.get("custom_generate") is not None', "False", "tests/test_calls.py",
    ),
    (
        "samples of a cache move alone", "cllava_fast/model/caches.py", "turn.selection.expand(rows).take(samples)",
        "turn.selection.expand(rows)", "tests/test_cache_moves.py",
    ),
    (
        "later turns forget the images", "cllava_fast/model/selecting.py",
        "filled.images[torch.arange(len(ids)) * len(filled.images) // len(ids)]", "none", "tests/test_caches.py",
    ),
    (
        "images of other sizes are shared out", "cllava_fast/model/images.py", "if not clear or", "if",
        "tests/test_bases.py",
    ),
    (
        "an image that nobody looked at is none", "cllava_fast/model/selecting.py",
        "selection = replace(selection, images=None)", "pass", "tests/test_caches.py",
    ),
    (
        "samples of a cache move without their images", "cllava_fast/methods/base.py",
        "images=None if self.images is None else function(self.images)", "images=self.images",
        "tests/test_caches.py",
    ),
    (
        "a turn that was cut off is forgotten", "cllava_fast/model/calls.py", "self._length() != self.length",
        "False", "tests/test_caches.py",
    ),
    (
        "a call that failed at once moved its cache on", "cllava_fast/model/calls.py",
        "self._length() != self.length", "True", "tests/test_caches.py",
    ),
    (
        "a cache outlives the increments it was filled with", "cllava_fast/pool.py", "self.loads += 1", "pass",
        "tests/test_caches.py",
    ),
    (
        "a branch is chosen before the prompt begins", "cllava_fast/methods/branch_lora.py", "if complete:", "if True:",
        "tests/test_method_branch_lora.py",
    ),
    (
        "the means of the context are not scaled", "cllava_fast/model/layer_scaling.py", '("B", "mean_B", "block_B")',
        '("B", "block_B")', "tests/test_layer_scaling.py",
    ),
    (
        "prompts are served by the base's template", "cllava_fast/model/files.py",
        "processor.chat_template = saved.chat_template", "pass", "tests/test_hub.py",
    ),
    (
        "images are served as the base's processor has them", "cllava_fast/model/files.py",
        'pad_to_square(processor, other["do_pad"][0])', "pass", "tests/test_hub.py",
    ),
    (
        "another preparation of images is not told", "cllava_fast/model/files.py",
        "in differing(saved.image_settings, image_settings(processor)).items():", "in ():",
        "tests/test_hub.py",
    ),
    (
        "a run goes on with other images", "cllava_fast/train/identity.py",
        '"image_settings": image_settings(processor),', "", "tests/test_checkpoint.py",
    ),
    (
        "a run learns images that the model was not patched with", "cllava_fast/train/loop.py",
        "patch(self.model, processor=self.data.encoder.processor)", "pass", "tests/test_train_refusals.py",
    ),
    (
        "a model that is patched has its processor replaced in silence", "cllava_fast/model/patching.py",
        'other = "" if processor is None else prepared_otherwise(processor, present.processor)', 'other = ""',
        "tests/test_patch.py",
    ),
    (
        "images that the model was not patched with are measured", "cllava_fast/evaluate/evaluation.py",
        "    _warn_of_another_processor(model, data.encoder.processor)\n", "", "tests/test_evaluation.py",
    ),
    (
        "a stranger's template is rendered", "cllava_fast/model/files.py",
        "if name_of(saved.chat_template) is None:", "if False:", "tests/test_hub.py",
    ),
    (
        "biases that a forward casts count", "cllava_fast/surrogate.py",
        'own.pop(f"{prefix}bias", None)', "pass", "tests/test_files.py",
    ),
    (
        "one reference is none", "cllava_fast/data/records.py", "if accepted and accepted !=",
        "if len(accepted) > 1 and accepted !=", "tests/test_data_readers.py",
    ),
    (
        "a sample may be one token too long", "cllava_fast/data/lengths.py", "if length > limit.tokens]",
        "if length > limit.tokens + 1]", "tests/test_data.py",
    ),
    (
        "a run goes on in its first epoch", "cllava_fast/train/tune.py",
        'self.trainer.go_on_behind(self.saved["step"])', "pass", PROCESSES,
    ),
    ("activity is each process's own", BRANCH, "distributed.average(gates)", "pass", PROCESSES),
    (
        "each process takes the lock to look", "cllava_fast/cli/running.py",
        "distributed.on_main(lambda: _check_output(config, stream, processor))",
        "_check_output(config, stream, processor)", PROCESSES,
    ),
    (
        "an evaluation alone is each process's own", "cllava_fast/evaluate/evaluation.py", "distributed.start()",
        "pass", PROCESSES,
    ),
    (
        "each process prints an evaluation", "cllava_fast/cli/eval.py", "if distributed.is_main():", "if True:",
        "tests/test_user_path.py",
    ),
    (
        "what fills up a batch is active", BRANCH, "gates *= present", "gates *= (present == present)",
        "tests/test_method_branch_lora.py",
    ),
    (
        "a tangent is zero", "cllava_fast/ops/library.py", "_refuse_tangents(op, args)", "pass",
        "tests/test_op_library.py",
    ),
    (
        "gradient of a weighed past", "cllava_fast/ops/inject/autograd.py", "copy=True).mul_(rows)", "copy=True)",
        "tests/test_op_inject.py",
    ),
]  # fmt: skip
