"""Qatana inside other people's training loops; each module needs an extra, none is imported unasked."""
