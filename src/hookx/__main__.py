from hookx.cli import main

main()
