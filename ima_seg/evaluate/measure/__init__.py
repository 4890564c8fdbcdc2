"""Numbers from predictions and from records: metrics, statistics, comparisons, the summary."""
