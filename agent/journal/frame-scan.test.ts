import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from '@jest/globals'
import { RecordKind } from '../../core/record/index.ts'
import { SCAN_WINDOW_BYTES, scanFrames } from './frame-scan.ts'
import { buildFrame, temporaryDirectory } from './testing.ts'

test('a buffer used again: what an earlier scan left in it is never taken for the file', async () => {
  await using directory = await temporaryDirectory()
  await using handle = await open(join(directory.path, 'frames'), 'w+')
  const frames = [1, 2, 3].map((firstSeq) => buildFrame({ firstSeq, records: [{ kind: RecordKind.write, fill: firstSeq }] }))
  await handle.writev(frames, 0)
  const frameBytes = frames[0].length
  const window = Buffer.allocUnsafeSlow(SCAN_WINDOW_BYTES)
  const scan = async (): Promise<[string, number][]> => {
    const events: [string, number][] = []
    for await (const event of scanFrames(handle, { fromBytes: 0, toBytes: 3 * frameBytes, expectedSeq: 1, lastSeq: 3 }, window)) {
      events.push(event.is === 'frame' ? ['frame', event.frame.header.firstSeq] : ['bad', event.bad.firstSeq])
    }
    return events
  }
  expect(await scan()).toEqual([['frame', 1], ['frame', 2], ['frame', 3]])
  for (const keptBytes of [3 * frameBytes - 1, 2 * frameBytes + 64, 2 * frameBytes]) {
    await handle.truncate(keptBytes)
    expect(await scan()).toEqual([['frame', 1], ['frame', 2], ['bad', 3]])
  }
})
