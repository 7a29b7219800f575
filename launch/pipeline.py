from rlhf_trl.cli.pipeline import main

main()
