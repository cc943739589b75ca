"""The plan stage: what a data set will take here (`costs`), and on other machines (`scaling`)."""
