"""The serve stage: a bank behind a page and behind the interfaces of annotation tools."""
