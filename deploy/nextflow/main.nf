// Segment images or plates by jobs of Nextflow, without a server on any node.
//
//   nextflow run deploy/nextflow --source plate.zarr --target segmented.zarr --options '--channel DNA --device cuda'
//
// Addresses are absolute, or of an object store: each job has a folder of its own.
// The network runs in `shares` jobs; with -profile gpu each has a GPU. The stages before and after it
// compute little. They run in one job each, on all of its cores.

// Record the plan, and measure intensities of volumes that take several blocks.
process PREPARE {
    label 'megaseg_cpu'
    tag "${target}"

    input:
    tuple val(source), val(target)

    output:
    tuple val(target), path('shares.txt')

    // Exit code 1 of plan: fields of a plate are missing, and named; FINISH ends with 1, too.
    script:
    """
    megaseg plan '${source}' '${target}' ${params.options} \\
        --label-name '${params.label_name}' --threads ${params.threads} --record || [ \$? -eq 1 ]
    megaseg-shares before '${target}' '${params.label_name}' ${task.cpus} |
        run-shares '${target}' ${task.cpus}
    megaseg-shares network '${target}' '${params.label_name}' ${params.shares} > shares.txt
    """
}

// Run the network on one share of the blocks, or of the fields of a plate.
process PREDICT {
    label 'megaseg_gpu'
    tag "${target} ${share}/${count}"

    input:
    tuple val(target), val(run), val(stage), val(share), val(count)

    output:
    val target

    script:
    """
    megaseg task '${target}' ${stage} --label-name '${run}' --share ${share}/${count}
    """
}

// Join blocks, write the other levels, and publish.
process FINISH {
    label 'megaseg_cpu'
    tag "${target}"

    input:
    val target

    output:
    val target

    script:
    """
    megaseg-shares after '${target}' '${params.label_name}' ${task.cpus} |
        run-shares '${target}' ${task.cpus}
    megaseg join '${target}' --label-name '${params.label_name}'
    """
}

workflow MEGASEG {
    take:
    images // [source, target]

    main:
    PREPARE(images)
    shares = PREPARE.out.flatMap { target, file ->
        def lines = file.readLines()
        lines.collect { line -> [groupKey(target, lines.size())] + line.tokenize() }
    }
    PREDICT(shares)
    FINISH(PREDICT.out.map { target -> [target, true] }.groupTuple().map { target, _all -> target.toString() })

    emit:
    FINISH.out
}

workflow {
    if (!params.source || !params.target) {
        error "give --source and --target"
    }
    MEGASEG(channel.of([params.source, params.target]))
}
