import { expect, test } from '@jest/globals'
import { CdpError, errorMessage } from './cdp-error.ts'

test('an error that was followed by one of the clean-up is not lost behind it', async () => {
  const failing = async (): Promise<void> => {
    await using cleanUp = { [Symbol.asyncDispose]: () => Promise.reject(new Error('the file would not close')) }
    expect(cleanUp).toBeDefined()
    throw new CdpError('CONFLICT', 'the disk is held by a backup')
  }
  expect(await failing().catch(errorMessage)).toBe('the disk is held by a backup; and then: the file would not close')
})
