"""Training: the callback and the optimizer's groups for anybody's Trainer, and the verbs `train`, `evaluate` and `probe`.

    callback    SpectrumCallback          optim     parameter groups, rates of their own
    tasks       how rows become batches   judge     how good the result is          generation   text that it writes
    arguments   flags -> the trainer's    settle    all that is checked before the model is loaded
    run         the run itself            watch     what it is watched for
    rate_race   the learning rate, found  steps     how many there will be          dry_run      what a run would be
    saved       what was trained, opened again

Nothing is imported here: the callback needs neither datasets nor TRL.
"""
