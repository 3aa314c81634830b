"""Real runs of layouts, one after the other, beside the cost model's predictions."""
