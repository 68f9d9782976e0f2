"""Every stage, command, evaluation task, step, score and view that align has without extensions."""

from __future__ import annotations

from align.registry import Command, Extension, Score, Stage, Step, Task, Topic, View
from align.store.artifacts import Kind

TRAINING = "align.capacity.estimate_training"
SAMPLING = "align.capacity.estimate_sampling"
SUPERVISED = "align.lint.encodings:SUPERVISED"
MARGINS = {"test_accuracy_after": "held-out accuracy", "test_margin_after": "margin"}
RL_HEADLINE = {"score_first": "score", "score_last": "→", "kl_last": "KL", "engine": "engine"}


def _preference(
    kind: str, config: str, run: str, purpose: str, verb: str, lint: str = "align.lint.encodings:PAIRS"
) -> Stage:
    """Return a stage that learns from stored preferences."""
    return Stage(
        kind, 7, Kind.POLICY, config, run, purpose, distributed=True, estimator=TRAINING, headline=MARGINS, lint=lint,
        card_verb=verb,
    )  # fmt: skip


def _rl(kind: str, version: int, config: str, purpose: str, verb: str) -> Stage:
    """Return a stage that learns from responses that it samples."""
    return Stage(
        kind, version, Kind.POLICY, config, "align.stages.rl:run", purpose, distributed=True, samples=True,
        estimator=TRAINING, headline=RL_HEADLINE, lint="align.lint.encodings:PROMPTS", card_verb=verb,
    )  # fmt: skip


# fmt: off
STAGES = (
    Stage(
        "model", 2, Kind.MODEL, "align.config.stages.inputs:ModelConfig", "align.stages.model:run",
        "bring a base model into the store as plain safetensors", inspector="align.stages.model",
        headline={"parameters": "parameters", "architecture": ""}, card_verb="imported",
    ),
    Stage(
        "artifact", 1, None, "align.config.stages.inputs:ArtifactConfig", "align.stages.artifact:run",
        "take a finished artifact from a store or a checkpoint's folder as it is", inspector="align.stages.artifact",
    ),
    Stage(
        "data", 6, None, "align.config.stages.inputs:DataConfig", "align.stages.data:run",
        "build a dataset from a recipe", inspector="align.stages.data",
        headline={"train_rows": "train", "test_rows": "test"},
    ),
    Stage(
        "pretrain", 6, Kind.POLICY, "align.config.stages.sft:PretrainConfig", "align.stages.pretrain:run",
        "continued pre-training on plain texts, packed", distributed=True, estimator=TRAINING,
        card_verb="pre-trained further on plain texts",
    ),
    Stage(
        "sft", 7, Kind.POLICY, "align.config.stages.sft:SftConfig", "align.stages.sft:run",
        "supervised fine-tuning on responses", distributed=True, estimator=TRAINING,
        headline={"test_loss_before": "held-out loss", "test_loss_after": "→"}, lint=SUPERVISED,
        card_verb="fine-tuned on responses",
    ),
    Stage(
        "sample", 8, Kind.PREFERENCES, "align.config.stages.sample:SampleConfig", "align.stages.sample:run",
        "sample responses from a checkpoint, score and pair them", samples=True, estimator=SAMPLING,
        headline={"train_pairs": "pairs", "train_mean_score": "mean score", "engine": "engine"},
    ),
    Stage(
        "reward", 7, Kind.REWARD, "align.config.stages.reward:RewardConfig", "align.stages.reward:run",
        "train a reward model on pairs", distributed=True, estimator=TRAINING,
        headline={"test_accuracy_after": "held-out accuracy", "test_accuracy_true_after": "on true labels"},
        lint="align.lint.encodings:SCORED_PAIRS", card_verb="trained to score responses",
    ),
    _preference(
        "dpo", "align.config.stages.preference:DpoConfig", "align.stages.dpo:run",
        "direct preference optimization on pairs", "trained with DPO on preference pairs",
    ),
    _preference(
        "kto", "align.config.stages.preference:KtoConfig", "align.stages.kto:run",
        "learning from single answers marked as wanted or not", "trained with KTO on answers marked as wanted or not",
        "align.lint.encodings:UNPAIRED",
    ),
    _preference(
        "orpo", "align.config.stages.preference:OrpoConfig", "align.stages.reference_free:orpo",
        "fine-tuning and preference learning in one loss, without a reference", "trained with ORPO on preference pairs",
    ),
    _preference(
        "cpo", "align.config.stages.preference:CpoConfig", "align.stages.reference_free:cpo",
        "contrastive preference optimization, without a reference", "trained with CPO on preference pairs",
    ),
    _preference(
        "simpo", "align.config.stages.preference:SimpoConfig", "align.stages.reference_free:cpo",
        "preference optimization per token with a margin, without a reference",
        "trained with SimPO on preference pairs",
    ),
    Stage(
        "distill", 8, Kind.POLICY, "align.config.stages.sft:DistillConfig", "align.stages.distill:run",
        "learn a teacher's distribution over the next token", distributed=True, estimator=TRAINING,
        headline={"test_divergence_before": "held-out nats from the teacher", "test_divergence_after": "→"},
        lint=SUPERVISED, card_verb="distilled from a teacher",
    ),
    _rl(
        "ppo", 9, "align.config.stages.policy_gradient:PpoConfig",
        "PPO with a critic against a reward model or a checker", "trained with PPO and a critic",
    ),
    _rl(
        "grpo", 8, "align.config.stages.policy_gradient:GrpoConfig",
        "GRPO and its variants: responses to a prompt compared, without a critic", "trained with GRPO",
    ),
    _rl(
        "rloo", 7, "align.config.stages.policy_gradient:RlooConfig",
        "REINFORCE with the other responses to a prompt as the baseline", "trained with RLOO",
    ),
    _rl(
        "online_dpo", 7, "align.config.stages.best_of_n:OnlineDpoConfig",
        "DPO on pairs of the policy's own responses, update by update",
        "trained with DPO on pairs of its own responses",
    ),
    _rl(
        "rejection", 7, "align.config.stages.best_of_n:RejectionConfig",
        "best-of-N fine-tuning on the policy's own responses, in rounds", "fine-tuned on the best of its own responses",
    ),
    Stage(
        "merge", 1, None, "align.config.stages.merge:MergeConfig", "align.stages.merge:run",
        "make one checkpoint of several: soups, SLERP, TIES, DARE, WARP", card_verb="merged from several checkpoints",
    ),
    Stage(
        "evaluate", 13, Kind.SCORECARD, "align.config.stages.evaluate:EvaluateConfig", "align.stages.evaluate:run",
        "compare systems on prompts, benchmarks and by judges, with intervals", samples=True, estimator=SAMPLING,
        inspector="align.evaluation.tasks", headline={"reward_accuracy": "RM accuracy"},
    ),
    Stage(
        "report", 2, Kind.REPORT, "align.config.stages.evaluate:ReportConfig", "align.report.run.run_report:run",
        "one HTML page about the whole run", headline={"stages": "stages"},
    ),
)
"""In the order of a usual pipeline."""
COMMANDS = (
    Command(
        "run", "run a pipeline and write its report; finished stages are skipped, a killed stage resumes",
        "align.cli.main:RUN", works=True,
    ),
    Command(
        "plan", "show what `run` would do with each stage, and why; --memory and --hardware estimate what it needs",
        "align.cli.main:PLAN",
    ),
    Command("explain", "show which fields changed since each stage last finished", "align.cli.main:EXPLAIN"),
    Command(
        "init", "copy a commented starting point: a YAML file with data and functions; without a name, list them",
        "align.cli.init",
    ),
    Command("list", "list the artifacts in the store and the runs that use them", "align.cli.artifacts:LIST"),
    Command(
        "show", "show an artifact's record; --log prints its log, --verify checks the digest of every file",
        "align.cli.artifacts:SHOW",
    ),
    Command("gc", "list artifacts that no run uses any more; --delete deletes them", "align.cli.artifacts:GC"),
    Command(
        "fields", "print the fields of a stage or another block: type, default, bounds and meaning", "align.cli.fields",
    ),
    Command("schema", "print the JSON schema of pipeline files, for editors", "align.cli.main:SCHEMA"),
    Command(
        "completion", "print a script for bash, zsh or fish that completes commands, options, files and stages",
        "align.cli.completion",
    ),
    Command("chat", "chat with a checkpoint: a folder, an artifact's key, or PIPELINE:STAGE", "align.cli.main:CHAT"),
    Command(
        "serve", "serve checkpoints by vLLM's OpenAI server on this machine, with a key; several adapters of one base",
        "align.cli.serve",
    ),
    Command(
        "doctor", "check the installation: packages, engine, device, disk space and extensions", "align.cli.doctor",
    ),
    Command(
        "data", "work with datasets: build a recipe, show its rows, lint them, compare builds, push one to the Hub",
        "align.cli.data", works=True,
    ),
    Command(
        "eval", "score checkpoints and their base model by a suite of tasks; cached and resumable like any run",
        "align.cli.evaluate", works=True,
    ),
    Command(
        "rollout", "play episodes of a stage's environment with a checkpoint and print them; nothing is trained",
        "align.cli.rollout",
    ),
    Command(
        "score", "score stored rows or responses again, compare two scores, or --validate a score before training",
        "align.cli.score",
    ),
    Command(
        "report", "write the report of a run, by name or by pipeline file; --open opens it in a browser",
        "align.cli.report",
    ),
    Command(
        "compare", "compare runs on one page: changed settings against results, score against KL, training curves",
        "align.cli.report:COMPARE",
    ),
    Command(
        "export",
        "write a checkpoint as an ordinary model folder, check its answers and describe it; --push uploads it",
        "align.cli.export", works=True,
    ),
    Command(
        "studio", "start the local web application of a store, which shows its runs live; --read-only changes nothing",
        "align.cli.studio", works=True,
    ),
    Command(
        "status", "show the state of each stage of a run, here and on a cluster; without a name, of every run",
        "align.cli.status",
    ),
    Command(
        "cancel", "end a run's cluster jobs or its local process; finished stages and checkpoints are kept",
        "align.cli.status:CANCEL",
    ),
    Command(
        "push", "upload finished stages that the store's bucket lacks; runs do so by themselves",
        "align.cli.artifacts:PUSH", works=True,
    ),
)
TASKS = (
    Task("ifeval", "align.config.stages.evaluation.tasks:IfevalConfig", "align.evaluation.tasks.ifeval"),
    Task("ifbench", "align.config.stages.evaluation.tasks:IfbenchConfig", "align.evaluation.tasks.ifeval"),
    Task("gsm8k", "align.config.stages.evaluation.tasks:Gsm8kConfig", "align.evaluation.tasks.sampled"),
    Task(
        "multiple_choice", "align.config.stages.evaluation.tasks:MultipleChoiceConfig",
        "align.evaluation.tasks.multiple_choice",
    ),
    Task("xstest", "align.config.stages.evaluation.tasks:XstestConfig", "align.evaluation.tasks.sampled"),
    Task(
        "humaneval", "align.config.stages.evaluation.benchmarks:HumanevalConfig", "align.evaluation.tasks.programs",
        "align.evaluation.tasks.programs:identities",
    ),
    Task("mbpp", "align.config.stages.evaluation.benchmarks:MbppConfig", "align.evaluation.tasks.programs"),
    Task(
        "environment", "align.config.stages.evaluation.tasks:EnvironmentTaskConfig",
        "align.evaluation.tasks.environment", "align.evaluation.tasks.environment:identities",
    ),
    Task(
        "judged", "align.config.stages.evaluation.tasks:JudgedConfig", "align.evaluation.tasks.judged",
        "align.evaluation.tasks.judged:identities",
    ),
    Task("preference", "align.config.stages.evaluation.tasks:PreferenceConfig", "align.evaluation.tasks.likelihood"),
    Task(
        "perplexity", "align.config.stages.evaluation.tasks:PerplexityConfig", "align.evaluation.tasks.perplexity",
        "align.evaluation.tasks.perplexity:identities",
    ),
    Task(
        "reward_pairs", "align.config.stages.evaluation.tasks:RewardPairsConfig", "align.evaluation.tasks.reward_pairs",
    ),
    Task(
        "reward_bench_2", "align.config.stages.evaluation.benchmarks:RewardBench2Config",
        "align.evaluation.tasks.generative_reward",
    ),
    Task(
        "lm_eval", "align.config.stages.evaluation.tasks:LmEvalConfig", "align.evaluation.lm_eval.task",
        "align.evaluation.lm_eval.task:identities",
    ),
)
"""In the order of the guide."""
STEPS = (
    Step(
        "normalize", "align.config.recipe.step_settings:NormalizeStep", "align.data.steps.normalize:Normalize",
        identities="align.data.steps.normalize:normalize_identities",
    ),
    Step(
        "filter", "align.config.recipe.filter_settings:FilterStep", "align.data.steps.filter:Filter",
        identities="align.data.steps.filter:filter_identities",
    ),
    Step("divide", "align.config.recipe.step_settings:DivideStep", "align.data.steps.split:Divide"),
    Step("pairs", "align.config.recipe.step_settings:PairsStep", "align.data.steps.pairs:Pairs"),
    Step(
        "score", "align.config.recipe.step_settings:ScoreStep", "align.data.steps.score:Score", needs_all_rows=True,
        runs_model=True, identities="align.data.steps.score:scorer_identities",
    ),
    Step(
        "exact_duplicates", "align.config.recipe.step_settings:ExactDuplicatesStep",
        "align.data.steps.deduplicate:ExactDuplicates", needs_all_rows=True,
    ),
    Step(
        "near_duplicates", "align.config.recipe.step_settings:NearDuplicatesStep",
        "align.data.steps.deduplicate:NearDuplicates", needs_all_rows=True,
    ),
    Step(
        "semantic_duplicates", "align.config.recipe.step_settings:SemanticDuplicatesStep",
        "align.data.steps.deduplicate:SemanticDuplicates", needs_all_rows=True, runs_model=True,
        identities="align.data.steps.deduplicate:embedder_identities",
    ),
    Step(
        "decontaminate", "align.config.recipe.step_settings:DecontaminateStep",
        "align.data.steps.decontaminate:Decontaminate", needs_all_rows=True,
        identities="align.data.steps.decontaminate:evaluation_set_identities",
    ),
    Step("cap", "align.config.recipe.step_settings:CapStep", "align.data.steps.split:Cap", needs_all_rows=True),
    Step("mix", "align.config.recipe.step_settings:MixStep", "align.data.steps.split:Mix", needs_all_rows=True),
    # Not written in recipes: every build ends with these.
    Step("usable", "", "align.data.steps.split:Usable"),
    Step("identical", "", "align.data.steps.split:Identical", needs_all_rows=True),
    Step("max_rows", "", "align.data.steps.split:MaxRows", needs_all_rows=True),
    Step("split", "", "align.data.steps.split:Split", needs_all_rows=True),
)
SCORES = (
    Score("gold", "align.data.checkers:gold"),
    Score("gsm8k_answer", "align.data.checkers:gsm8k_answer"),
    Score("reasoning_gym", "align.data.families.gym_tasks:verified"),
    Score("gsm8k_strict", "align.data.published_scores:gsm8k_strict"),
    Score("countdown", "align.data.published_scores:countdown"),
    Score("reverse_text", "align.data.published_scores:reverse_text"),
)
VIEWS = (
    View("runs", "Runs", "align.studio.runs_view"),
    View("rollouts", "Rollouts", "align.studio.rollouts.rollouts_view"),
    View("evaluations", "Evaluations", "align.studio.evaluations.evaluations_view"),
    View("chat", "Chat", "align.studio.chat_view"),
    View("data", "Data", "align.studio.data_view"),
)
"""In the order of the navigation."""
TOPICS = (
    Topic(
        "pipeline", "Pipeline file", "The top level of a pipeline's YAML, and the `loop:` that repeats stages.",
        ("align.pipeline.pipeline:PipelineConfig", "align.pipeline.loops:LoopConfig"),
    ),
    Topic(
        "runtime", "Runtime", "Where and how a pipeline runs. Nothing here changes a result or a key.",
        ("align.config.runtime:Runtime",),
    ),
    Topic(
        "tuning", "Tuning", "Which weights are trained. Every stage that trains has the block `tuning:`.",
        ("align.config.tuning:Tuning",),
    ),
    Topic(
        "recipe", "Data recipes", "A dataset's sources, the steps its rows go through, and the split.",
        ("align.config.recipe.recipe:Recipe",),
    ),
    Topic(
        "task", "Evaluation tasks", "The `tasks:` of an `evaluate` stage, and of `evaluate:` in a stage that trains.",
        ("align.config.stages.evaluate:AnyTask",),
    ),
)
# fmt: on

EXTENSION = Extension("the core", (*STAGES, *COMMANDS, *TASKS, *STEPS, *SCORES, *VIEWS, *TOPICS))
