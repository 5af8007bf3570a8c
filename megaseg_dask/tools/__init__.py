"""Before and after a run: report, viewer, training, doctor, evaluation, demo."""
