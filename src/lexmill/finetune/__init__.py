"""Stage 4: a pretrained model learns a task from labelled examples."""
