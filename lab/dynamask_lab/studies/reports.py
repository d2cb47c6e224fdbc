"""The reports of all studies; importing this module registers them."""

from dynamask_lab.studies.ablation.report import report_ablation
from dynamask_lab.studies.locality.report import report_locality
from dynamask_lab.studies.mqar.report import report_mqar
from dynamask_lab.studies.needle.report import report_needle
from dynamask_lab.studies.reading.report import report_reading
from dynamask_lab.studies.recurrent.report import report_recurrent
from dynamask_lab.studies.scaling.report import report_scaling
from dynamask_lab.studies.scratch.report import report_scratch

__all__ = [
    "report_ablation",
    "report_locality",
    "report_mqar",
    "report_needle",
    "report_reading",
    "report_recurrent",
    "report_scaling",
    "report_scratch",
]
