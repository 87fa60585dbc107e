import { stat } from 'node:fs/promises'
import { SECTOR_BYTES } from '../../core/record/index.ts'
import { NO_DATA, diskOfKey, offsetOfKey } from './extent.ts'
import { ExtentCursor } from './extent-source.ts'
import type { FilePool } from './file-pool.ts'
import { PageCache } from './page-cache.ts'
import { RunReader } from './run-reader.ts'
import { locateLeafRun } from './vm-files.ts'

/** A range of a disk of which a segment holds the newest data, or zeroes (`frameOffset` undefined), among its own. */
export type LeafExtent = { disk: number; offsetBytes: number; lengthBytes: number; frameOffset: number | undefined }

const PAGES = 64 * 4096

/**
 * What the leaf run of a sealed segment says, without its frames; undefined if the segment has no run.
 * @throws CdpError CHECKSUM, FORMAT if the run is damaged; Node's error
 */
export const leafExtents = async (files: FilePool, path: string, wanted: (frameOffset: number | undefined) => boolean): Promise<LeafExtent[] | undefined> => {
  const place = await locateLeafRun(files, path, (await stat(path)).size)
  if (place === undefined) return undefined
  const run = await RunReader.open(place, files, new PageCache(PAGES))
  const cursor = new ExtentCursor()
  const extents: LeafExtent[] = []
  let ready = run.seek(cursor, 0)
  for (let key = 0; ; ) {
    while (!ready) {
      await run.load(cursor)
      ready = run.seek(cursor, key)
    }
    if (cursor.startKey === Infinity) return extents
    const frameOffset = cursor.sector === NO_DATA ? undefined : cursor.frame
    if (wanted(frameOffset)) {
      extents.push({ disk: diskOfKey(cursor.startKey), offsetBytes: offsetOfKey(cursor.startKey), lengthBytes: (cursor.endKey - cursor.startKey) * SECTOR_BYTES, frameOffset })
    }
    key = cursor.endKey
    if (cursor.held.size > 8) cursor.held.clear()
    ready = run.next(cursor)
  }
}
