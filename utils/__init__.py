"""Parts that know nothing of data sets or methods: flags, metrics, files, optimizers, look-ups."""
