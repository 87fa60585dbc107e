import { errorMessage } from '../../core/errors/index.ts'
import { FaultRig } from './fault-rig.ts'
import { kindOf, nameOf, type Cell, type RigKind } from './matrix.ts'
import { runCell, type CellResult } from './run-cell.ts'

export type CellOutcome = { cell: Cell; problem?: string; result?: CellResult }

/** Runs the cells, one after the other; neighbours of one kind share a rig, unless one of them failed. With `enough`, the cell that runs is the last. */
export const runCells = async (cells: readonly Cell[], say: (line: string) => void, enough?: AbortSignal): Promise<CellOutcome[]> => {
  const outcomes: CellOutcome[] = []
  let rig: { of: FaultRig; kind: RigKind } | undefined
  const end = async (): Promise<void> => {
    const ended = rig?.of
    rig = undefined
    await ended?.[Symbol.asyncDispose]()
  }
  try {
    for (const cell of cells) {
      if (enough?.aborted === true) break
      try {
        const kind = kindOf(cell)
        if (rig === undefined || JSON.stringify(rig.kind) !== JSON.stringify(kind)) {
          await end()
          rig = { of: await FaultRig.start(kind), kind }
        }
        const result = await runCell(rig.of, cell)
        outcomes.push({ cell, result })
        say(`ok      ${nameOf(cell)}: longest gap ${result.longestGapMs} ms (not protected: ${result.controlGapMs} ms), ${result.seconds} s`)
      } catch (error) {
        outcomes.push({ cell, problem: errorMessage(error) })
        say(`FAILED  ${nameOf(cell)}: ${errorMessage(error)}\n${rig?.of.all.logs(4_000) ?? ''}`)
        await end().catch((cause: unknown) => say(`the rig did not end cleanly: ${errorMessage(cause)}`))
      }
    }
  } finally {
    await end()
  }
  return outcomes
}
