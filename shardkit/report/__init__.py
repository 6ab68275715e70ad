"""What people look at: lines, pictures, tables, and the directory that keeps them.

Owns `Report`, which hands what happens in a run to all of them. Its invariant: what
is optional (TensorBoard, the picture) never fails a run; where its package is
missing, one notice says so.
"""

from shardkit.report.jsonl import MetricsFile as MetricsFile
from shardkit.report.jsonl import StepLike as StepLike
from shardkit.report.jsonl import read_records as read_records
from shardkit.report.report import Report as Report
from shardkit.report.run_dir import RunDirectory as RunDirectory
from shardkit.report.summary import summarize as summarize
from shardkit.report.terminal import Terminal as Terminal
from shardkit.report.twin import TwinComparison as TwinComparison
from shardkit.report.twin import compare_runs as compare_runs
