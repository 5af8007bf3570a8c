"""One function per stage: it reads what the stage before wrote, and writes its own objects."""
