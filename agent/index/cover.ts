import type { RunFile } from './vm-files.ts'

/** A stretch of segments and the merged run that stands for it; without one it is a single segment with its own leaf run. */
export type CoverPart = { firstSegment: number; lastSegment: number; run: RunFile | undefined }

/**
 * Which runs to ask for the whole segments first ... last: of the highest level that fits, leaf runs where none does. Newest first.
 * A run may begin before `first`: what it says about segments that are gone is in the mirror.
 */
export const planCover = (first: number, last: number, runs: readonly RunFile[]): CoverPart[] => {
  const highestFirst = [...runs].sort((a, b) => b.level - a.level || b.lastSegment - a.lastSegment)
  const parts: CoverPart[] = []
  const byLastSegment = new Map<number, RunFile>()
  for (const run of highestFirst) if (!byLastSegment.has(run.lastSegment)) byLastSegment.set(run.lastSegment, run)
  for (let segment = last; segment >= first;) {
    const run = byLastSegment.get(segment)
    parts.push({ firstSegment: run?.firstSegment ?? segment, lastSegment: segment, run })
    segment = (run?.firstSegment ?? segment) - 1
  }
  return parts
}
