"""Corpora: one module per dataset, saying where its files, labels, patients and folds are."""
