"""Everything between photos and scores, in one process: stages, and the folders of what they share.

    photos + masks -prepare-> data set -extract-> store -train-> run -evaluate-> rows -analyze, report-> tables, page
                                                                  └-predict-> masks of new photos

Stages, each a command of its name. A stage is a function that returns a result and prints nothing:

prepare     class-number masks from official sources that come without them
plan        bytes, seconds per stage, what fits and from when a store pays, told before anything is made
extract     the backbone once over every photo, its features into a store
train       a head on episodes of a store, with exact resume
packed      several heads trained in one process on the same reading
sweep       many configurations, each trained where it needs to be, tested and kept
sweep_case  one of them: alone or packed, tested, and what became of it
sweep_status  what its cases tell while they run, and how they hear that they shall stop
sweep_file  sweeps as YAML files, every key checked
sweep_plan  what a sweep would do, told before anything is trained
evaluate    episodes answered by a head, one row for each
predict     masks of new photos from a few photos with masks
serve       a bank behind a page and behind the interfaces of annotation tools
review      what prediction wrote, looked at, corrected, and predicted again
analyze     rows -> scores with intervals, spreads and paired tests
supports    how much the choice of the support matters, and which one to take
compare     what a codec costs: correlations and mIoU of one store against another
report      rows and runs -> one page
doctor      what works on this machine and what will not

Folders, each importing only those above it:

common      no subject of this project: whole files, columns, locks, seeded randomness, runners, pictures
datasets    photos, masks, classes and lists: readers by name
annotations  formats of annotation tools: marked photos in, found objects out
episodes    which photos meet: drawing, protocols, manifests
features    what a stored feature is: recipe, weights, precisions, the budgeted codec
store       features on disk or in a bucket: shards, markers, their summary, growth, repair
loading     from episodes to tensors: sources, batches and how they reach a device, residence in memory
heads       what answers an episode: configurations, checkpoints, runs, segmenters
bank        annotated photos with their features, what is fitted to them, and how well it does on photos left out
scores      rows of an evaluation and what is computed from them; stands on common and episodes alone
"""
