"""What a study's results depend on, so that a journal is never mixed with another's."""

import hashlib
import json

from traces.store import trace_digest
from tuner.costs import profile_paths
from tuner.replays import Replayable


def study_identity(replays: Replayable) -> str:
    """A digest of the scenario (but for the number of trials), the content of its trace, and that of its files.

    Of an elastic scenario, of what its model is too, wherever that lies.
    """
    scenario = replays.scenario
    document = scenario.model_dump(mode="json", by_alias=True, exclude={"trace", "costs", "study", "elastic"})
    costs = [path.read_text(encoding="utf-8") for path in profile_paths(scenario)]
    costs += [
        path.read_text(encoding="utf-8") for path in (scenario.cluster.file, scenario.output_errors) if path is not None
    ]
    study = scenario.study.model_dump(mode="json", exclude={"trials"})
    content = json.dumps([document, study, costs, trace_digest(replays.trace), *replays.model_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
