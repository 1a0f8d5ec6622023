"""Breaks important lines of the package one at a time, and lists what no test notices.

    python experiments/mutants/mutants.py [ID ...]

Works in a copy of the tree. The tests that a row names must pass there as the tree stands; then each mutation is
applied alone, its tests run until one fails, and `mutants.csv` gets a row with that test. Every run of tests is a fork
of this process, which has imported the libraries but nothing of the package. Several processes may share the ids.
"""

import contextlib
import csv
import fcntl
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("mutants.csv")
LIBRARIES = ("pytest", "torch", "torchvision", "timm", "lightning.pytorch", "torchmetrics", "open_clip", "hydra")
LIMIT_S = 300  # for the tests of one mutant
OUT_OF_TIME = "(out of time)"  # a hang is noticed, too
NOBODY = ""
RUNNING = "running"  # a file that names the test


class Mutant(NamedTuple):
    """A line of the package that is replaced, and the tests, in `tests/`, that should notice."""

    id: str
    file: str
    text: str
    replacement: str
    tests: str


class Result(NamedTuple):
    """A row of `mutants.csv`; `noticed_by` is the first test that failed."""

    id: str
    file: str
    mutation: str
    noticed_by: str
    seconds: str


def mutants() -> list[Mutant]:
    """The table, ordered as the package is."""
    return [Mutant(id, f"coca_lit/{file}", *rest) for file, rows in TABLE.items() for id, *rest in rows]


TABLE: dict[str, list[tuple[str, str, str, str]]] = {
    "losses/contrastive.py": [
        (
            "contrastive_rank",
            "        own = rank() * len(images)\n",
            "        own = 0\n",
            "losses/test_losses.py::test_losses_on_several_ranks_equal_one_process_with_the_global_batch",
        ),
        ("contrastive_diagonal", ".sub_(2)", ".sub_(1)", "losses/test_losses.py"),
        (
            "contrastive_direction",
            "over_texts + over_images[own : own + len(images)] - 2 * pairs",
            "2 * over_texts - 2 * pairs",
            "losses/test_losses.py",
        ),
    ],
    "losses/siglip.py": [
        ("siglip_tile", ".diagonal(own + rows.start).sub_(1)", ".diagonal(own).sub_(1)", "losses/test_losses.py"),
        (
            "siglip_bias",
            "torch.addmm(bias, images[rows] * scale, texts.T)",
            "torch.addmm(-bias, images[rows] * scale, texts.T)",
            "losses/test_losses.py",
        ),
    ],
    "losses/caption.py": [
        (
            "caption_world",
            "return total * world_size() / count.clamp(min=1)",
            "return total / count.clamp(min=1)",
            "losses/test_losses.py::test_losses_on_several_ranks_equal_one_process_with_the_global_batch",
        ),
        ("caption_ignored", "real = targets != IGNORED_LABEL", "real = targets != 0", "losses/test_losses.py"),
        ("caption_smoothing", "p.sub_(smoothing / len(vocabulary))", "p.sub_(smoothing)", "losses/test_losses.py"),
    ],
    "losses/gradients.py": [
        (
            "outer_gradient",
            "times(g, outer[0].to(g.dtype))",
            "g",
            "losses/test_losses.py",
        ),
    ],
    "distributed.py": [
        (
            "gather_backward",
            "reduce_scatter(own, gradients[0].contiguous())",
            "own.copy_(gradients[0].chunk(world_size())[rank()])",
            "test_distributed.py::test_collectives_on_two_ranks",
        ),
        (
            "gather_order",
            "return everything\n",
            "return torch.cat(everything.chunk(world_size())[::-1])\n",
            "test_distributed.py::test_collectives_on_two_ranks",
        ),
        (
            "logsumexp_ranks",
            "highest + sum_over_ranks((x - highest).exp()).log()",
            "x",
            "test_distributed.py::test_collectives_on_two_ranks",
        ),
    ],
    "models/text.py": [
        (
            "legacy_cls_position",
            'return lengths if self.cls_mask == "correct" else (lengths + 1).clamp(max=self.context_length)',
            "return lengths",
            "models/test_coca.py -k legacy",
        ),
        (
            "legacy_cls_mask",
            "(causal & ~torch.diag_embed(is_cls & ~fills_context[:, None]))",
            "(causal & ~torch.diag_embed(is_cls))",
            "models/test_coca.py -k legacy",
        ),
        (
            "prefix_predicted",
            "layout.positions >= prefix_lengths[:, None] - 1",
            "layout.positions >= prefix_lengths[:, None]",
            "models/test_prefixes.py",
        ),
        (
            "attention_map_queries",
            "            states = self_block(states)\n            if cross_block is not None:\n"
            "                queries = by_image(states,",
            "            before, states = states, self_block(states)\n            if cross_block is not None:\n"
            "                queries = by_image(before,",
            "models/test_attention_weights.py",
        ),
        (
            "decoder_depth",
            "init_depth or 2 * layers",
            "init_depth or layers",
            "models/test_coca.py -k initial",
        ),
    ],
    "models/init.py": [
        ("mlp_deviation", "(2 * width) ** -0.5)", "width**-0.5)", "models/test_coca.py -k initial"),
    ],
    "models/layers.py": [
        (
            "prompt_causal",
            "causal = mask is None and q.shape[2] > 1",
            "causal = False",
            "models/generation/test_strategies.py -k greedy",
        ),
        (
            "folded_norm",
            "torch.addmv(self.kv.bias, self.kv.weight, norm.bias)",
            "self.kv.bias",
            "weights/test_open_clip.py -k 'features or losses'",
        ),
        (
            "attention_map_norm",
            "return self.attention.weights(self.norm_1(x), keys_values)",
            "return self.attention.weights(x, keys_values)",
            "models/test_attention_weights.py",
        ),
    ],
    "models/packing.py": [
        (
            "packed_cls",
            "to_device(self._starts + positions, rows.device)",
            "to_device(self._starts + positions - 1, rows.device)",
            "models/test_packing.py -k padded",
        ),
        (
            "cache_rows",
            "written = self._keys_values[:, rows, :, : self.used]",
            "written = self._keys_values[:, : len(rows), :, : self.used].clone()",
            "models/generation/test_strategies.py -k beams",
        ),
    ],
    "models/coca.py": [
        (
            "temperature_limit",
            "self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)",
            "self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)",
            "models/test_coca.py -k clamp",
        ),
    ],
    "models/likelihood.py": [
        (
            "unknown_words_counted",
            "counted &= labels != unknown",
            "counted &= labels >= 0",
            "evals/test_reranking.py -k once",
        ),
    ],
    "models/generation/beam.py": [
        (
            "beam_done",
            "return closed, (worst > NEVER) & (worst >= scores[:, 0])",
            "return closed, worst > NEVER",
            "models/generation/test_strategies.py",
        ),
        (
            "beam_length",
            "counted = (counted - prompts.lengths).clamp(min=1)",
            "counted = counted.clamp(min=1)",
            "models/generation/test_strategies.py",
        ),
        (
            "beam_caches",
            "rows = source + torch.arange(len(source), device=source.device)[:, None] * self.num_beams",
            "rows = source.clone()",
            "models/generation/test_strategies.py",
        ),
        (
            "beam_cut_off",
            "scores = force_token(scores, self.constraints.end_id)",
            "scores = scores.clone()",
            "models/generation/test_strategies.py",
        ),
        (
            "beam_legacy_length",
            "still = (opened.scores / counted**self.length_penalty)",
            "still = (opened.scores / (counted - 1) ** self.length_penalty)",
            "models/generation/test_open_clip_generation.py models/generation/test_strategies.py",
        ),
    ],
    "models/generation/decode.py": [
        (
            "nucleus",
            "before = probabilities.cumsum(dim=-1) - probabilities",
            "before = probabilities.cumsum(dim=-1)",
            "models/generation/test_generate_options.py -k top",
        ),
        (
            "repetition",
            "torch.where(seen < 0, seen * penalty, seen / penalty)",
            "seen / penalty",
            "models/generation/test_strategies.py",
        ),
        (
            "minimal_length",
            "if ids.shape[1] < self.min_length:",
            "if ids.shape[1] <= self.min_length:",
            "models/generation/test_strategies.py",
        ),
        (
            "mean_log_probability",
            "(log_probs / written)",
            "(log_probs / length)",
            "models/generation/test_generate_options.py -k 'log_probabilities or rerank'",
        ),
    ],
    "projects/coca2/text.py": [
        (
            "attention_map_modern",
            "block.norm_x(states + block.attn(normed, table, None, None, None))",
            "block.norm_x(states)",
            "projects/coca2/test_coca2_everywhere.py -k attention",
        ),
        (
            "modern_blocks_run_again",
            'wanted == "blocks"',
            'wanted != "blocks"',
            "projects/coca2/test_modern_text.py -k again",
        ),
        (
            "third_cross_block",
            "image = keys_values[i // self.every] if",
            "image = keys_values[min(i, len(keys_values) - 1)] if",
            "projects/coca2/test_modern_text.py -k cached",
        ),
        (
            "map_pool_of_contrast",
            '("pool", "projection") if',
            '("projection",) if',
            "projects/coca2/test_modern_text.py -k alone",
        ),
    ],
    "projects/naflex/batches.py": [
        (
            "budget_rounded",
            "max(budgets) // budget",
            "round(max(budgets) / budget)",
            "projects/naflex/test_patches.py -k schedule",
        ),
    ],
    "projects/naflex/inputs.py": [
        (
            "crop_budget",
            "budget or self.max_patches)",
            "budget or 4 * self.max_patches)",
            "projects/naflex/test_patches.py -k timm",
        ),
    ],
    "projects/rewards/cider.py": [
        (
            "cider_documents",
            "counts.update({ngram for words in captions for ngram in ngrams(words)})",
            "counts.update([ngram for words in captions for ngram in ngrams(words)])",
            "projects/rewards/test_reward_cider.py",
        ),
        (
            "cider_clipped",
            "min(own[g], theirs[g]) if self._defended",
            "own[g] if self._defended",
            "projects/rewards/test_reward_cider.py",
        ),
        (
            "cider_length",
            "return total * math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))",
            "return total",
            "projects/rewards/test_reward_cider.py",
        ),
    ],
    "projects/mammut/text.py": [
        (
            "mammut_depth",
            "depth=len(self.tower.blocks))",
            "depth=len(self.cross_blocks))",
            "projects/mammut/test_mammut.py -k initial",
        ),
    ],
    "metrics/captions.py": [
        (
            "bleu_closest",
            "(abs(other - length), other))",
            "(abs(other - length), -other))",
            "metrics/test_uncertainty.py -k resample",
        ),
        (
            "bleu_brevity",
            "np.exp(np.minimum(0, 1 - ",
            "np.exp(np.maximum(0, 1 - ",
            "metrics/test_uncertainty.py -k resample",
        ),
        (
            "ref_clip_score_clamp",
            "cosines.new_zeros(len(images)).scatter_reduce",
            "cosines.new_full((len(images),), -1.0).scatter_reduce",
            "metrics/test_caption_table.py",
        ),
        ("clip_score_clamp", ".sum(dim=1).clamp(min=0)", ".sum(dim=1)", "metrics/test_caption_table.py"),
    ],
    "metrics/retrieval.py": [
        ("recall_ties", "(similarity_QC >= best_Q1)", "(similarity_QC > best_Q1)", "metrics/test_retrieval.py"),
        ("recall_k", "weights=ranks[name] < k", "weights=ranks[name] <= k", "metrics/test_retrieval.py"),
    ],
    "metrics/classification.py": [
        (
            "absent_classes",
            "/ (totals > 0).sum(axis=1)",
            "/ classes",
            "metrics/test_metric_classes.py::test_accuracy_equals_that_of_torchmetrics_but_for_ties_and_absent_classes",
        ),
    ],
    "projects/reasoning/accuracy.py": [
        (
            "vqa_leave_one_out",
            "(same - (person == given)) / ENOUGH",
            "same / ENOUGH",
            "projects/reasoning/test_vqa_accuracy.py -k accuracy",
        ),
    ],
    "metrics/java/spice.py": [
        (
            "spice_null",
            "math.nan if row[kind] is None else row[kind]",
            "0.0 if row[kind] is None else row[kind]",
            "metrics/test_spice.py -k zero",
        ),
    ],
    "metrics/uncertainty.py": [
        (
            "paired_p",
            "scatter = np.abs(values - values.mean())",
            "scatter = np.abs(values)",
            "metrics/test_uncertainty.py -k differ",
        ),
        ("interval_centred", " + (self.score - known.mean())", "", "metrics/test_uncertainty.py -k centred"),
        (
            "last_image_drawn",
            "random.integers(units, size",
            "random.integers(max(units - 1, 1), size",
            "metrics/test_uncertainty.py -k often",
        ),
    ],
    "projects/rewards/self_critical.py": [
        ("policy_baseline", " * (samples / (samples - 1))", "", "projects/rewards/test_policy.py"),
        (
            "policy_sign",
            "advantages.repeat_interleave(lengths)",
            "-advantages.repeat_interleave(lengths)",
            "projects/rewards/test_policy.py",
        ),
        (
            "forced_end",
            "lengths = lengths.where(lengths < self._longest(net), lengths - 1)",
            "lengths = lengths.clone()",
            "projects/rewards/test_self_critical.py::test_gradient_equals_captions_one_by_one",
        ),
    ],
    "projects/choice/evaluation.py": [
        (
            "winoground_tie",
            "pairs[:, 0, 0] > pairs[:, 1, 1]",
            "pairs[:, 0, 0] >= pairs[:, 1, 1]",
            "projects/choice/test_choice.py -k by_hand",
        ),
    ],
    "training/optim.py": [
        ("warm_up", "return (step + 1) / warmup_steps", "return step / warmup_steps", "training/test_optim.py"),
        ("decayed", "if p.ndim > 1 and name", "if name", "training/test_optim.py"),
        (
            "layer_decay",
            "self.layer_decay ** depth.get(name, 0) * factor",
            "self.layer_decay ** (depth.get(name, 1) - 1) * factor",
            "training/test_optim.py",
        ),
        ("warm_up_end", "if step < warmup_steps:", "if step <= warmup_steps:", "training/test_optim.py -k by_hand"),
        (
            "image_factor",
            'name.startswith("image_encoder.")',
            'name.startswith("image_")',
            "training/test_optim.py -k slowly",
        ),
    ],
    "training/gradient_caching.py": [
        (
            "cached_tokens",
            "token_count = sum_over_ranks(label_count(net, batch))",
            "token_count = label_count(net, batch)",
            "training/test_gradient_caching.py::test_micro_batches_on_two_ranks_equal_the_whole_batch_on_one",
        ),
        (
            "cached_dropout",
            "    with seeded(part.seed, net.device):\n",
            "    with torch.random.fork_rng():\n",
            "training/test_gradient_caching.py::test_dropout_is_the_same_in_both_passes",
        ),
    ],
    "training/lightning_fixes.py": [
        (
            "resumed_position",
            'counts.update(dict.fromkeys(counts, counts["completed"]))',
            "counts.update(counts)",
            "runs/test_resume.py::test_killed_twice_in_an_epoch[indexed-2-extra0]",
        ),
    ],
    "projects/generative/objectives.py": [
        (
            "prefix_of_a_question",
            "prefix_lengths=prefix_lengths(batch) + prompt_lengths",
            "prefix_lengths=1 + prompt_lengths",
            "projects/generative/test_generative_objectives.py -k prompts",
        ),
    ],
    "callbacks/guards.py": [
        (
            "guard_statistics",
            "buffer.copy_(before)",
            "before.copy_(buffer)",
            "runs/test_resume.py::test_step_that_is_not_finite_changes_nothing",
        ),
        (
            "guard_gradients",
            "parameter.grad = None",
            "parameter.requires_grad_()",
            "runs/test_resume.py::test_step_that_is_not_finite_changes_nothing",
        ),
    ],
    "callbacks/scoring.py": [
        (
            "every_n_epochs",
            "count % (every * e.every) == 0",
            "count % e.every == 0",
            "callbacks/test_scoring.py::test_scores_come_every_n_epochs_or_steps_and_at_the_end",
        ),
        (
            "scores_of_the_average",
            "with scored_weights(trainer, pl_module), _scorable(pl_module) as net:",
            "with _scorable(pl_module) as net:",
            "callbacks/test_scoring.py::test_averaged_weights_are_scored",
        ),
    ],
    "callbacks/checkpoint.py": [
        (
            "step_seeds",
            'stable_seed("step", self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)',
            "self.seed",
            "callbacks/test_step_seeds.py",
        ),
        (
            "best_kept",
            "if path.resolve() not in kept:",
            "if path not in ():",
            "callbacks/test_scoring.py::test_the_best_checkpoint_is_kept",
        ),
    ],
    "callbacks/progress.py": [
        (
            "samples_of_all_ranks",
            "_samples(batch) * world_size()",
            "_samples(batch)",
            "callbacks/test_progress.py -k ranks",
        ),
        (
            "speed_of_an_epoch",
            "        self._restart()\n\n    def on_train_batch_start",
            "        pass\n\n    def on_train_batch_start",
            "callbacks/test_progress.py",
        ),
    ],
    "runs/checkpoint_io.py": [
        (
            "saved_is_read_back",
            "            inspect(temporary)\n",
            "            temporary.stat()\n",
            "runs/test_resume.py::test_what_could_not_be_loaded_is_not_saved",
        ),
    ],
    "runs/resume.py": [
        (
            "compared_keys",
            '*("model", "data", "trainer", "callbacks"),',
            '*("data", "trainer", "callbacks"),',
            "runs/test_resume.py::test_changed_config_is_refused_by_its_key",
        ),
    ],
    "runs/run_folder.py": [
        (
            "rewound_rows",
            "kept = [row for row in whole if int(row[column]) < logged_steps]",
            "kept = [row for row in whole if int(row[column]) <= logged_steps]",
            "runs/test_resume.py::test_killed_twice_in_an_epoch[indexed-2-extra0]",
        ),
    ],
    "runs/redaction.py": [
        ("redacted_password", "|password|", "|", "runs/test_redaction.py::test_names_of_secrets"),
    ],
    "files.py": [
        (
            "half_a_line",
            "end = _remove_incomplete_line(file)",
            "end = file.seek(0, os.SEEK_END)",
            "tools/caption/test_caption_resume.py::test_lines",
        ),
    ],
    "data/loader.py": [
        (
            "ranks_share_batches",
            "range(first + self.rank, first + size, self.world)",
            "range(first, first + size, self.world)",
            "data/test_loader.py",
        ),
    ],
    "data/bad_samples.py": [
        ("lost_samples", "count = max(1, expected - read)", "count = 1", "data/test_data_faults.py -k lost_shard"),
    ],
    "data/transforms.py": [
        (
            "fallback_aspect",
            "w, h = width, height  # none fits",
            "w, h, aspect = width, height, 1.0  # none fits",
            "projects/naflex/test_patches.py -k timm",
        ),
    ],
    "data/shards/tar.py": [
        (
            "tar_end",
            "if headers.last + file.read(tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):",
            "if False:",
            "data/test_data_faults.py data/shards/test_shards.py",
        ),
        (
            "tar_escape",
            'if name.startswith("/") or ".." in PurePosixPath(name).parts:',
            'if name.startswith("/"):',
            "data/shards/test_hostile_shards.py -k out_of_the_shard",
        ),
    ],
    "data/mixture.py": [
        (
            "mixture_shares",
            "due[i] = (counts[i] + 0.5) / weights[i]",
            "due[i] += 1 / sum(weights)",
            "data/test_mixture.py -k shares",
        ),
    ],
    "data/shards/training.py": [
        (
            "replacement_source",
            "        start = self.source_ends[source - 1] if source else 0\n        end = self.source_ends[source]\n",
            "        start = 0\n        end = self.source_ends[-1]\n",
            "data/test_mixture.py -k broken_sample",
        ),
    ],
    "data/shards/index.py": [
        (
            "foreign_index",
            "if not index or index.stamp._replace(changed_at=0) != shard.stamp():",
            "if not index or index.stamp.bytes != shard.stamp().bytes:",
            "data/shards/test_windows.py -k believed",
        ),
        (
            "forged_index",
            "return index if _sound(index) else None",
            "return index",
            "data/shards/test_indexed_shards.py -k stranger",
        ),
    ],
    "data/shards/shard.py": [
        (
            "changed_shard",
            "(status.st_size, status.st_mtime_ns) != (stamp.bytes, stamp.changed_at)",
            "status.st_size != stamp.bytes",
            "data/shards/test_indexed_shards.py -k during",
        ),
    ],
    "data/shards/windows.py": [
        (
            "shared_shards_first",
            "            pieces.sort(key=lambda piece: piece.samples == self.counts[piece.shard])\n",
            "",
            "data/shards/test_windows.py -k naive",
        ),
        (
            "window_bytes",
            "int(min(samples, size / each))",
            "int(samples)",
            "data/shards/test_windows.py -k limits",
        ),
        ("cache_of_three_windows", "3 * self.bytes", "2 * self.bytes", "data/shards/test_windows.py -k cache"),
        (
            "released_late",
            "ahead.release(number - self.behind)",
            "ahead.release(number)",
            "data/shards/test_windows.py -k held",
        ),
    ],
    "data/shards/remote/shards.py": [
        (
            "kept_ahead",
            "self._held[shard] = context",
            "context.__exit__(None, None, None)",
            "data/shards/test_windows.py -k ahead",
        ),
    ],
    "data/shards/remote/cache.py": [
        (
            "cache_in_use",
            "                if not _in_use(path):\n",
            "                if True:\n",
            "data/shards/test_cache.py -k make_room",
        ),
        (
            "cache_changed",
            "if expected not in (None, found):",
            "if False:",
            "data/shards/test_windows.py -k changed_shard",
        ),
        (
            "cache_whole",
            "if partial.stat().st_size != size:",
            "if partial.stat().st_size > size:",
            "data/shards/test_cache.py -k downloads",
        ),
        (
            "cache_download_lock",
            "return _is_locked(path.with_suffix(LOCK))",
            "return True",
            "data/shards/test_cache.py -k killed_download",
        ),
    ],
    "weights/lora.py": [
        ("lora_rank", "torch.tensor(alpha / rank)", "torch.tensor(float(alpha))", "weights/test_lora.py -k rank"),
        ("lora_merged", "_sum(state[name], a, b, scale)", "state[name]", "weights/test_lora.py -k sum"),
    ],
    "weights/computation.py": [
        (
            "interpolation",
            "torch.lerp(theirs[name], tensor, weight)",
            "torch.lerp(tensor, theirs[name], weight)",
            "weights/test_interpolation.py",
        ),
        (
            "fact_of_the_mask",
            '*("cls_mask", "pooler", ',
            '*("pooler", ',
            "weights/test_computation.py -k 'contradict or keep'",
        ),
        (
            "heads_compared",
            "if isinstance(value, bool | int | float | str):",
            "if isinstance(value, bool | float | str):",
            "weights/test_interpolation.py",
        ),
    ],
    "weights/intact.py": [
        (
            "digest_compared",
            "if expected is not None and expected != _digest(state, metadata):",
            "if expected is not None and len(expected) != len(_digest(state, metadata)):",
            "weights/test_intact.py -k tensors",
        ),
    ],
    "weights/open_clip/tensors.py": [
        (
            "compiled_prefix",
            r'r"^(module\.|_orig_mod\.)+"',
            r'r"^(module\.)+"',
            "weights/test_open_clip.py -k training_runs",
        ),
    ],
    "tools/plan/estimate.py": [
        (
            "planned_logits",
            "logits = 4 * 2 * model.width",
            "logits = 3 * 2 * model.width",
            "tools/plan/test_plan.py -k by_hand",
        ),
    ],
    "projects/curation/choose.py": [
        (
            "chain_of_duplicates",
            "(alike[i, :i] & ~near[:i]).any()",
            "alike[i, :i].any()",
            "projects/curation/test_choose.py -k duplicate",
        ),
        (
            "best_rounded",
            "place = max(1, round(count * (top or 1)))",
            "place = max(1, int(count * (top or 1)))",
            "projects/curation/test_choose.py -k best",
        ),
    ],
    "projects/curation/judge.py": [
        (
            "aspect_of_tall_images",
            "(np.maximum(width, height) / np.minimum(width, height))",
            "(width / height)",
            "projects/curation/test_judge.py -k training",
        ),
    ],
    "projects/choice/chair.py": [
        (
            "object_counted_twice",
            "for word in words) for words, there",
            "for word in set(words)) for words, there",
            "projects/choice/test_chair.py -k by_hand",
        ),
        (
            "later_group",
            "for group in synonyms for word",
            "for group in reversed(synonyms) for word",
            "projects/choice/test_chair.py -k group",
        ),
        ("plural_of_f", '("ves", "f"), ', "", "projects/choice/test_chair.py -k objects_in"),
        (
            "all_references",
            "map(self.objects_in, record.captions)",
            "map(self.objects_in, record.captions[:1])",
            "projects/choice/test_chair.py -k references",
        ),
    ],
    "assets/published.json": [
        (
            "published_recall",
            '"t2i_recall@10": 0.7176',
            '"t2i_recall@10": 0.7167',
            "tools/report/test_report.py -k source",
        ),
    ],
}


def mutation(mutant: Mutant) -> str:
    return f"{mutant.text.strip()} → {mutant.replacement.strip()}"


def copied(folder: Path) -> Path:
    """The tree in a folder of its own, without what git or Python keep in it."""
    kept = ("coca_lit", "conf", "experiments", "tests", ".docs")
    for name in kept:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, folder / path.name)
    (folder / "outputs").mkdir()
    shutil.copy(ROOT / "outputs" / "README.md", folder / "outputs")
    return folder


def prepare(tree: Path) -> None:
    """Sets this process up for tests of that tree in forks of it."""
    sys.dont_write_bytecode = True  # compiled files are told apart by size and second: too coarse for this
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    os.environ.setdefault("COCA_SHARED_DATA", str(ROOT.parent / "shared" / "data"))
    for library in LIBRARIES:
        __import__(library)


def first_failure(tree: Path, tests: Iterable[str], seconds: float) -> str:
    """The first test that fails in a tree; `NOBODY` if all pass.

    Args:
        tests: arguments of pytest.

    Raises:
        ValueError: these arguments select no test, or pytest itself fails.
    """
    said = tree / "failed"
    said.write_text("")
    if (child := os.fork()) == 0:
        os._exit(_test(tree, [*tests], said))
    until, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < until:
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also what the tests have started
    if status is None:
        os.waitpid(child, 0)
        return OUT_OF_TIME
    failed = said.read_text()
    if status not in (0, 1) or bool(status) != bool(failed):
        raise ValueError(f"pytest {' '.join(tests)} ended with {status}:\n{(tree / 'log').read_text()}")
    return failed


def _test(tree: Path, tests: list[str], said: Path) -> int:
    """Runs pytest in this process, a fork; the first failure is written to `said`."""
    import pytest

    class First:
        def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
            if report.failed and not said.read_text():
                said.write_text(report.nodeid)

        pytest_runtest_logreport = pytest_collectreport = _note

        def pytest_runtest_logstart(self, nodeid: str) -> None:
            (tree / RUNNING).write_text(nodeid)

    os.setsid()
    log = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree / "tests")
    sys.path[0] = str(tree)
    code = pytest.main(["-x", "-n", "0", "-p", "no:cacheprovider", *tests], plugins=[First()])
    return 1 if code == pytest.ExitCode.INTERRUPTED and said.read_text() else int(code)  # a module cannot be imported


def examined(chosen: Iterable[Mutant], tree: Path) -> Iterator[Result]:
    """Each mutant's result, as soon as it is known.

    Raises:
        ValueError: its tests fail without it.
    """
    passed: set[str] = set()
    for mutant in chosen:
        tests = ["-m", "slow or not slow", *shlex.split(mutant.tests)]
        if mutant.tests not in passed and (failed := first_failure(tree, tests, LIMIT_S)):
            raise ValueError(f"{failed} fails without any mutation:\n{(tree / 'log').read_text()}")
        passed.add(mutant.tests)
        path, began = tree / mutant.file, time.monotonic()
        source = path.read_text()
        path.write_text(source.replace(mutant.text, mutant.replacement))
        try:
            noticed_by = first_failure(tree, tests, LIMIT_S)
        finally:
            path.write_text(source)
        yield Result(mutant.id, mutant.file, mutation(mutant), noticed_by, f"{time.monotonic() - began:.1f}")


def record(result: Result) -> None:
    """Puts a row in its place in `mutants.csv`; rows of mutants that the table no longer has are dropped."""
    with RESULTS.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = {row["id"]: Result(**row) for row in csv.DictReader(file)} | {result.id: result}
        file.truncate(0)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        writer.writerows(rows[mutant.id] for mutant in mutants() if mutant.id in rows)


def main(ids: list[str]) -> int:
    table = mutants()
    if unknown := set(ids) - {mutant.id for mutant in table}:
        sys.exit(f"there is no mutant {', '.join(sorted(unknown))}; the ids are in {Path(__file__).name}")
    chosen = [mutant for mutant in table if not ids or mutant.id in ids]
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        tree = copied(Path(folder))
        prepare(tree)
        for result in examined(chosen, tree):
            record(result)
            survivors += result.noticed_by == NOBODY
            print(f"{result.id}: {result.noticed_by or 'SURVIVED'} ({result.seconds} s)", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survived")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
