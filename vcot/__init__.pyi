# The Python API. docs/notebook.md says what each name is for; what is not listed here may change without notice.

# read a run
from .services.run.frames import load as load

# do the steps
from .eval.evaluate import (
    evaluate as evaluate,
    load_questions as load_questions,
    render_evaluation as render_evaluation,
)
from .pipeline.client import ChatClient as ChatClient
from .pipeline.images import ImageStore as ImageStore
from .pipeline.judging import judge_responses as judge_responses, read_judged as read_judged
from .pipeline.ledger import Ledger as Ledger
from .pipeline.pairs import build_pairs as build_pairs, read_pairs as read_pairs, split_pairs as split_pairs
from .pipeline.publish import pairs_digest as pairs_digest, publish_pairs as publish_pairs
from .pipeline.sample import Groups as Groups, Plan as Plan, sample as sample
from .pipeline.sources import load_tasks as load_tasks
from .services.gateway.admin import register as register, show_checkpoint as show_checkpoint, swap_to as swap_to
from .services.jobs.trainer import train as train
from .services.recipes.recipe import Recipe as Recipe, load_recipe as load_recipe
from .training.protocol.job import TrainJob as TrainJob

# add to the open lists
from .eval.benchmark import Benchmark as Benchmark, find_benchmark as find_benchmark
from .eval.rules import Rule as Rule
from .eval.scorer import build_score as build_score, read_final_part as read_final_part, score_exact as score_exact
from .pipeline.judges import Judge as Judge, find_judge as find_judge
from .pipeline.judges.model import ModelJudge as ModelJudge
from .pipeline.judges.verdict import Unreadable as Unreadable
from .pipeline.pairs import PairPolicy as PairPolicy, going_by_gains as going_by_gains
from .pipeline.parsers import parse_choice as parse_choice
from .pipeline.prompts import Prompt as Prompt, split_at as split_at, split_at_last as split_at_last
from .pipeline.sources.drafts import (
    Draft as Draft,
    Row as Row,
    digest_files as digest_files,
    file_image as file_image,
    read_json as read_json,
    read_row as read_row,
)
from .pipeline.sources.source import Source as Source, draw_from as draw_from, need_path as need_path

# the records
from .pipeline.pairs import PreferencePair as PreferencePair
from .pipeline.records import (
    CheckpointRef as CheckpointRef,
    ImageRef as ImageRef,
    Judgment as Judgment,
    Response as Response,
    SamplingParams as SamplingParams,
    Score as Score,
    Task as Task,
    Verdict as Verdict,
)
