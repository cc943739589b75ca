"""The report stage: rows of evaluations and run directories -> one page that opens in any browser, without a network.

inputs     rows files put into sets of one configuration; run directories
scores     every figure, by `pipeline.analyze`
tables     the figures as tables; published: the paper's numbers beside them
plots      learning curves, scores by object size, as SVG
origins    store, head and photos that the rows name, opened again and checked
choice     which episodes are shown; again: their predictions; drawing: their pictures; gallery: all of it
facts      protocol, digests, store sizes, versions
page/      template, style and script of the page
stage      puts it together
"""
