"""The commands of `hsnet`, one file per command or group: parse options, call one stage, print its result.

No logic of their own. Everything heavy is imported inside the commands, so that help appears at once.
"""
