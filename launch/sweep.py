from rlhf_trl.cli.sweep import main

main()
